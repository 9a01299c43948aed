// A conversation and everything that is read in it: the coloured words, the timeline, the circumplex, what is strongest.
// The live view, a stored conversation and two of them side by side are all made of this.

import { make, button, choice, picker, throttled, framed, signed, series } from "./dom.js";
import { catalog, thresholds, onCatalog } from "./catalog.js";
import { Transcript, legend, showTip } from "./transcript.js";
import { Timeline } from "./timeline.js";
import { Circumplex, placesOf } from "./circumplex.js";
import { Conversation, STRETCH } from "./conversation.js";

const KINDS = [
  ["inner", "Inner"],
  ["visible", "Visible"],
  ["gap", "Gap"],
  ["steered", "Steered"],
];
const EXPLAINED = {
  inner: "read in its context",
  visible: "the words of the reply alone",
  gap: "inner above visible",
  steered: "read while the model was steered",
};

const STRONGEST = 7;

export class Reader {
  /** `compact` has no circumplex and no list; `scroller` is what the words scroll in; `empty` stands there without a conversation. */
  constructor({ compact = false, scroller, onview = () => {}, height = 172, label = "Conversation" }) {
    this.compact = compact;
    this.onview = onview;
    this.conversation = new Conversation();
    this.view = { kind: "inner", name: "", scale: 4 };
    this.names = [];
    this.hovered = null;

    this.chips = make("div", { class: "chips", role: "radiogroup", "aria-label": "Emotion that colours the words" });
    this.chips.addEventListener("keydown", (event) => this.chipKey(event));
    this.add = picker("Watch another emotion", [], (name) => this.watch(name), { placeholder: "watch…" });
    this.kindPlace = make("div", { class: "kinds" });
    this.legendPlace = make("div");
    this.bar = make(
      "div",
      { class: "readbar" },
      this.chips,
      this.add.node,
      make("div", { class: "spring" }),
      this.kindPlace,
      this.legendPlace,
    );

    this.transcript = new Transcript(scroller, {
      onhover: (conversation, i, element) => {
        showTip(element, conversation, i, { ...this.view, names: this.names });
        if (conversation === this.conversation) this.timeline.point(element ? i : null);
        else if (!element) this.timeline.point(null);
      },
      onpick: (conversation, i) => {
        if (conversation === this.conversation) this.hold(i);
      },
    });
    this.timelinePanel = make("section", { class: "panel", "aria-label": `${label}: timeline` });
    this.key = make("span", { class: "quiet" });
    this.rangePlace = make("div");
    this.rangePlace.append(
      choice(
        "Part of the conversation",
        [
          ["0", "All"],
          ["300", "Latest 300"],
        ],
        "0",
        (value) => this.timeline.set({ latest: Number(value) }),
      ),
    );
    this.timelinePanel.append(
      make("header", {}, make("h2", {}, "Timeline"), this.key, make("div", { class: "spring" }), this.rangePlace),
    );
    this.timeline = new Timeline(this.timelinePanel, {
      height,
      oncursor: (i) => {
        this.pointed(i);
      },
      onpick: (i) => {
        this.transcript.reveal(i);
        this.hold(i);
      },
    });

    if (!compact) {
      this.planePanel = make(
        "section",
        { class: "panel", "aria-label": `${label}: circumplex` },
        make("header", {}, make("h2", {}, "Circumplex"), make("span", { class: "quiet" }, "valence × arousal")),
      );
      this.plane = new Circumplex(this.planePanel, {
        label:
          "The emotions in the plane of valence and arousal, with the way of this conversation; the list beside it says the same in numbers",
      });
      this.rows = make("ol", { class: "bars" });
      this.when = make("span", { class: "quiet" });
      this.topPanel = make(
        "section",
        { class: "panel", "aria-label": `${label}: strongest readings` },
        make("header", {}, make("h2", {}, "Strongest"), this.when),
        this.rows,
      );
      this.held = null;
    }
    this.slow = throttled(() => {
      this.list();
      this.updateChips();
    }, 160);
    this.fast = framed(() => {
      this.transcript.grow();
      this.timeline.set({});
      this.drawPlane();
      if (this.sticky) scroller.scrollTop = scroller.scrollHeight;
    });
    this.sticky = false;
    scroller.addEventListener(
      "scroll",
      () => {
        if (this.transcript.streaming) this.sticky = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
      },
      { passive: true },
    );
    onCatalog(() => this.catalogChanged());
    this.catalogChanged();
  }

  catalogChanged() {
    if (!catalog.names.length) return;
    this.places = placesOf(catalog.emotions);
    if (!this.names.length) {
      this.names = catalog.watched.slice(0, 4); // as many as stand in one row
      this.view.name = this.names[0];
    }
    this.refresh();
  }

  /** Show a conversation; `beside` maps numbers of turns to what was said without steering. */
  show(conversation, { beside = new Map(), streaming = false } = {}) {
    this.conversation = conversation;
    this.beside = beside;
    this.held = null;
    if (conversation.names().length && !conversation.names().includes(this.view.name)) {
      const known = this.names.filter((name) => conversation.names().includes(name));
      this.names = known.length ? known : conversation.names().slice(0, 4);
      this.view.name = this.names[0];
    }
    if (!conversation.has(this.view.kind)) this.view.kind = "inner";
    this.view.scale = scaleOf(conversation);
    this.transcript.view = { ...this.view };
    this.streaming(streaming);
    this.transcript.show(conversation, beside);
    this.refresh();
  }

  streaming(on) {
    this.transcript.streaming = on;
    this.sticky = on;
    if (!on) this.slow();
  }

  /** Tokens have arrived. */
  grow() {
    this.fast();
    this.slow();
  }

  /** Change what is shown: name, kind, names. */
  set(change, tell = true) {
    const { names, ...view } = change;
    if (names) this.names = names;
    Object.assign(this.view, view);
    if (!this.names.includes(this.view.name)) this.view.name = this.names[0] ?? "";
    this.view.scale =
      this.view.kind === "inner" || (this.conversation.unit ?? "z") === "z" ? scaleOf(this.conversation) : this.view.scale;
    this.transcript.colour(this.view);
    this.refresh();
    if (tell) this.onview({ name: this.view.name, kind: this.view.kind, names: this.names });
  }

  watch(name) {
    this.set({ names: [...new Set([...this.names, name])].slice(-8), name });
  }

  refresh() {
    const { kind, name, scale } = this.view;
    const unit = this.conversation.unit === "z" ? "z" : "cosine";
    this.add.offer(this.conversation.names().length ? this.conversation.names() : catalog.names);
    this.buildChips();
    const kinds = KINDS.filter(([each]) => this.conversation.has(each));
    const key = kinds.map(([each]) => each).join() + kind;
    if (this.kindPlace.dataset.key !== key) {
      this.kindPlace.dataset.key = key;
      this.kindPlace.replaceChildren(
        ...(kinds.length > 1 ? [choice("Reading", kinds, kind, (value) => this.set({ kind: value }))] : []),
      );
      this.kindPlace.title = EXPLAINED[kind];
    }
    this.legendPlace.replaceChildren(legend(scale, unit));
    const lines = kind === "inner" || kind === "steered" ? thresholds(catalog.rules, this.names) : [];
    const [besideTurn, beside] = [...(this.beside ?? [])].at(-1) ?? [null, null];
    this.timeline.set({ conversation: this.conversation, names: this.names, kind, name, lines, beside, besideTurn });
    this.key.textContent = [
      `mean over ${STRETCH} tokens, ${unit}`,
      kind === "inner" && this.conversation.has("visible") && "dotted: words alone",
      beside && "dashed: unsteered",
    ]
      .filter(Boolean)
      .join(" · ");
    this.rangePlace.hidden = this.conversation.spoken.length < 400;
    this.drawPlane();
    this.list();
  }

  buildChips() {
    this.chips.replaceChildren(
      ...this.names.map((name, n) => {
        const on = name === this.view.name;
        const chip = make(
          "button",
          {
            type: "button",
            class: "chip",
            role: "radio",
            "aria-checked": String(on),
            tabindex: on ? 0 : -1,
            vars: { "--own": `var(${series(n)})` },
            onclick: () => this.set({ name }),
            data: { name },
          },
          make("i"),
          make("span", {}, name),
          make("b", {}, ""),
        );
        const drop =
          this.names.length > 1 &&
          button(`Stop watching ${name}`, () => this.set({ names: this.names.filter((other) => other !== name) }), {
            sign: "cross",
            words: false,
            kind: "ghost tiny",
          });
        return make("span", { class: "chipbox" }, chip, drop);
      }),
    );
    this.updateChips();
  }

  chipKey(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || event.target.getAttribute("role") !== "radio") {
      if (event.key === "Delete" && event.target.dataset.name && this.names.length > 1)
        this.set({ names: this.names.filter((name) => name !== event.target.dataset.name) });
      return;
    }
    event.preventDefault();
    const at = this.names.indexOf(this.view.name);
    this.set({ name: this.names[(at + step + this.names.length) % this.names.length] });
    this.chips.querySelector('[aria-checked="true"]').focus();
  }

  /** The token that numbers are said of: the one under the cursor, the chosen one, else the latest. */
  get here() {
    return this.hovered ?? this.held ?? this.conversation.spoken.at(-1) ?? -1;
  }

  updateChips() {
    for (const chip of this.chips.querySelectorAll(".chip")) {
      const value = this.conversation.mean(this.view.kind, chip.dataset.name, this.here);
      chip.querySelector("b").textContent = Number.isNaN(value) ? "" : signed(value, 1);
    }
  }

  pointed(i) {
    this.hovered = i;
    this.transcript.mark(i ?? this.held);
    this.slow();
  }

  hold(i) {
    this.held = this.held === i ? null : i;
    this.transcript.mark(this.held);
    this.slow();
  }

  drawPlane() {
    if (this.compact || !this.places) return;
    const { conversation, here } = this;
    const ranked = here >= 0 ? conversation.ranked(here) : [];
    const values = new Map(ranked);
    const path = conversation.walk(this.places);
    const end = this.hovered ?? this.held;
    const upTo = end === null ? path.x.length : conversation.spoken.indexOf(end) + 1;
    this.plane.set({
      places: this.places,
      names: this.names,
      path: { x: path.x.slice(0, upTo), y: path.y.slice(0, upTo) },
      named: ranked.slice(0, 6).map(([name]) => name),
      values: (name) => values.get(name) ?? NaN,
    });
  }

  list() {
    if (this.compact) return;
    const { conversation, here } = this;
    this.updateChips();
    this.drawPlane();
    const chosen = this.hovered ?? this.held;
    this.when.textContent =
      chosen === null
        ? here < 0
          ? ""
          : `latest ${Math.min(STRETCH, conversation.spoken.length)} tokens`
        : `up to token ${conversation.positions[chosen]}`;
    const ranked =
      here >= 0 ? conversation.ranked(here, { kind: conversation.has(this.view.kind) ? this.view.kind : "inner" }) : [];
    const shown = ranked.length > STRONGEST + 3 ? [...ranked.slice(0, STRONGEST), ...ranked.slice(-3)] : ranked;
    if (!shown.length) {
      this.rows.replaceChildren(
        make(
          "li",
          { class: "quiet none" },
          conversation.length ? "Nothing was read here." : "What reads highest and lowest will stand here.",
        ),
      );
      return;
    }
    if (this.rows.children.length !== shown.length || !this.rows.firstChild.parts) {
      this.rows.replaceChildren(
        ...shown.map((_, n) => {
          const [name, bar, value] = [make("button", { type: "button", class: "link" }), make("i"), make("b")];
          const row = make("li", { class: n === STRONGEST ? "gap" : "" }, name, make("span", { class: "bar" }, bar), value);
          name.addEventListener("click", () => this.watch(name.textContent));
          row.parts = { name, bar, value };
          return row;
        }),
      );
    }
    const scale = this.view.scale;
    shown.forEach(([name, z], n) => {
      const row = this.rows.children[n].parts;
      if (row.name.textContent !== name) {
        row.name.textContent = name;
        row.name.title = `Watch ${name}`;
      }
      row.value.textContent = signed(z, scale < 1 ? 3 : 1);
      row.bar.className = z > 0 ? "up" : "down";
      row.bar.style.setProperty("--share", Math.min(1, Math.abs(z) / scale).toFixed(3));
    });
  }
}

/** At which value the colour is full: four standard deviations; for cosines what few tokens reach. */
function scaleOf(conversation) {
  if (conversation.unit === "z" || !conversation.length) return 4;
  const values = conversation
    .names()
    .flatMap((name) => [...conversation.column("inner", name).values].filter((value) => !Number.isNaN(value)).map(Math.abs))
    .sort((a, b) => a - b);
  return values[Math.floor(0.99 * values.length)] || 1;
}
