// The words of a conversation, coloured by what is read at each token.
//
// A turn is cut into runs of tokens. A run that is far from the screen is one piece of plain text; when it comes near, its
// tokens become elements with colours, and plain text again when it leaves. The text is the same in both, so nothing moves,
// the browser's own search finds every word, and a conversation of fifty thousand tokens scrolls like one of fifty.

import { make, signed, plain, icon } from "./dom.js";

const RUN = 96;
export const LEVELS = 8;

/** The class that colours a number: up for above baseline, down for below, in steps; none near zero or where nothing was read. */
export function level(value, scale) {
  if (Number.isNaN(value)) return "";
  const step = Math.min(LEVELS, Math.round((LEVELS * Math.abs(value)) / scale));
  return step ? (value > 0 ? "u" : "d") + step : "";
}

class Run {
  constructor(conversation, start) {
    this.conversation = conversation;
    [this.start, this.end, this.shown] = [start, start, start];
    this.live = false;
    this.node = make("span", { class: "run" });
    this.node.run = this;
  }

  /** Take in tokens that have arrived. */
  grow(paint) {
    const { tokens } = this.conversation;
    if (this.live) {
      const fresh = document.createDocumentFragment();
      for (; this.shown < this.end; this.shown++) fresh.append(this.token(this.shown, paint));
      this.node.append(fresh);
    } else {
      this.node.textContent = tokens.slice(this.start, this.end).join("");
      this.shown = this.end;
    }
  }

  token(i, paint) {
    const node = document.createElement("span");
    node.textContent = this.conversation.tokens[i];
    node.className = paint(this.conversation, i);
    node.at = i;
    return node;
  }

  wake(paint) {
    if (this.live) return;
    this.live = true;
    this.node.textContent = "";
    this.shown = this.start;
    this.grow(paint);
  }

  sleep() {
    if (!this.live) return;
    this.live = false;
    this.grow();
  }

  colour(paint) {
    if (!this.live) return;
    let i = this.start;
    for (const node of this.node.children) node.className = paint(this.conversation, i++);
  }
}

/** A turn: whose it is, its numbers, its words. */
class Turn {
  constructor(conversation, { role, start }, owner, label = "") {
    Object.assign(this, { conversation, role, start, owner });
    this.end = start;
    this.runs = [];
    this.numbers = make("span", { class: "numbers" });
    this.text = make("p", { dir: "auto", class: "words" });
    this.notes = make("div", { class: "notes" });
    const kind = role === "user" || role === "assistant" ? role : "other";
    this.node = make(
      "article",
      { class: `turn ${kind}`, "aria-label": `${label || role} says` },
      make("header", {}, make("h3", {}, label || role), this.numbers),
      this.text,
      this.notes,
    );
    this.noted = 0;
  }

  grow(end) {
    while (this.end < end) {
      let run = this.runs[this.runs.length - 1];
      if (!run || run.end - run.start >= RUN) {
        run = new Run(this.conversation, this.end);
        this.runs.push(run);
        this.text.append(run.node);
        this.owner.near.observe(run.node);
        if (this.owner.streaming) run.live = true;
      }
      run.end = Math.min(end, run.start + RUN);
      run.grow(this.owner.paint);
      this.end = run.end;
    }
  }

  summarise({ kind, name }) {
    const found = this.conversation.summary(kind, name, this.start, this.end);
    this.numbers.replaceChildren(
      ...(found
        ? [
            make("span", {}, "mean ", make("b", {}, signed(found.mean))),
            make("span", {}, "peak ", make("b", {}, signed(found.peak))),
          ]
        : []),
    );
  }
}

export class Transcript {
  /**
   * `scroller` is what scrolls; `onhover(conversation, i, element)` is told which token the pointer is at, or null;
   * `onpick(conversation, i)` which one was clicked.
   */
  constructor(scroller, { onhover = () => {}, onpick = () => {} } = {}) {
    this.scroller = scroller;
    this.node = make("div", { class: "talk" });
    scroller.append(this.node);
    this.view = { kind: "inner", name: "", scale: 4 };
    this.paint = (conversation, i) => {
      const value = conversation.at(this.view.kind, this.view.name, i);
      const own = level(value, this.view.scale);
      return this.fired.get(conversation)?.has(i) ? `${own} fired` : own;
    };
    this.fired = new Map();
    this.turns = [];
    this.streaming = false;
    this.near = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) {
          if (isIntersecting) target.run.wake(this.paint);
          else if (!this.streaming || target.run !== this.last?.runs.at(-1)) target.run.sleep();
        }
      },
      { root: scroller === document.scrollingElement ? null : scroller, rootMargin: "700px 0px" },
    );
    const token = (event) => (event.target.at === undefined ? null : event.target);
    this.node.addEventListener("pointerover", (event) => {
      const node = token(event);
      onhover(node && node.parentNode.run.conversation, node && node.at, node);
    });
    this.node.addEventListener("pointerleave", () => onhover(null));
    this.node.addEventListener("click", (event) => {
      const node = token(event);
      if (node && !String(getSelection())) onpick(node.parentNode.run.conversation, node.at);
    });
    this.at = null;
  }

  get last() {
    return this.turns[this.turns.length - 1];
  }

  /** Show a conversation from its beginning. `beside` maps numbers of turns to what was said without steering. */
  show(conversation, beside = new Map()) {
    this.near.disconnect();
    this.node.replaceChildren();
    Object.assign(this, { conversation, beside, turns: [], at: null });
    this.fired = new Map();
    this.grow();
  }

  /** Take in what has arrived since. */
  grow() {
    const { conversation } = this;
    if (!conversation) return;
    for (const one of [conversation, ...this.beside.values()]) this.noteAlerts(one);
    for (const { turn, role, start, end } of conversation.turns()) {
      let view = this.turns[turn];
      if (!view) {
        view = this.turns[turn] = new Turn(conversation, { role, start }, this);
        this.node.append(view.node);
      }
      if (view.end < end) {
        view.grow(end);
        view.summarise(this.view);
      }
      this.note(view, turn);
      if (this.beside.has(turn)) this.pair(view, this.beside.get(turn), turn);
    }
  }

  /** The unsteered reply in a second column of the same turn. */
  pair(view, other, turn) {
    if (!view.other) {
      const last = other.turns().find((one) => one.turn === turn);
      if (!last) return;
      view.other = new Turn(other, last, this, "without steering");
      view.node.querySelector("h3").textContent = `${view.role}, steered`;
      const both = make("div", { class: "pair" });
      view.node.replaceWith(both);
      both.append(view.node, view.other.node);
    }
    const end = other.length;
    if (view.other.end < end) {
      view.other.grow(end);
      view.other.summarise(this.view);
    }
  }

  noteAlerts(conversation) {
    const marks = this.fired.get(conversation) ?? new Set();
    this.fired.set(conversation, marks);
    for (const alert of conversation.alerts) {
      const i = conversation.find(alert.token);
      if (i < 0 || marks.has(i)) continue;
      marks.add(i);
      this.eachRun((run) => {
        if (run.conversation === conversation && run.start <= i && i < run.end) run.colour(this.paint);
      });
    }
  }

  note(view, turn) {
    const own = view.conversation.alerts.filter((alert) => view.conversation.turn[view.conversation.find(alert.token)] === turn);
    for (const alert of own.slice(view.noted)) {
      view.notes.append(
        make(
          "button",
          { type: "button", class: "note", onclick: () => this.reveal(view.conversation.find(alert.token)) },
          icon("flag"),
          make("b", {}, alert.rule),
          make(
            "span",
            {},
            Object.entries(alert.scores)
              .map(([name, z]) => `${name} ${signed(z)}`)
              .join(", "),
          ),
          make("span", { class: "quiet" }, `token ${alert.token}`),
        ),
      );
    }
    view.noted = own.length;
  }

  *everyTurn() {
    for (const view of this.turns) {
      if (!view) continue;
      yield view;
      if (view.other) yield view.other;
    }
  }

  eachRun(work) {
    for (const view of this.everyTurn()) view.runs.forEach(work);
  }

  /** Colour by another emotion, another kind of reading, another scale. */
  colour(view) {
    this.view = { ...this.view, ...view };
    this.eachRun((run) => run.colour(this.paint));
    for (const turn of this.everyTurn()) turn.summarise(this.view);
    this.mark(this.at);
  }

  find(i) {
    return this.turns.find((view) => view && view.start <= i && i < view.end)?.runs.find((run) => run.start <= i && i < run.end);
  }

  /** Mark one token, as the cursor of the timeline does; null for none. */
  mark(i) {
    this.node.querySelectorAll(".at").forEach((node) => node.classList.remove("at"));
    this.at = i;
    const run = i === null ? null : this.find(i);
    if (run?.live) run.node.children[i - run.start]?.classList.add("at");
  }

  /** Bring a token into sight. */
  reveal(i) {
    const run = this.find(i);
    if (!run) return;
    run.wake(this.paint);
    run.node.children[i - run.start]?.scrollIntoView({ block: "center" });
    this.mark(i);
  }
}

// ── what is said of one token ──

const tip = make("div", { class: "tip", role: "tooltip" });
tip.hidden = true;

/** The numbers of a token beside it; null hides them. */
export function showTip(element, conversation, i, { kind, name, names }) {
  if (!element) {
    tip.hidden = true;
    return;
  }
  if (!tip.isConnected) document.body.append(tip);
  const own = [...new Set([name, ...names])].filter((each) => !Number.isNaN(conversation.at(kind, each, i)));
  const strongest = conversation
    .ranked(i, { kind, alone: true })
    .filter(([each]) => !own.includes(each))
    .slice(0, 3);
  const row = ([each, value], chosen) =>
    make("div", { class: chosen ? "chosen" : "" }, make("dt", {}, each), make("dd", { class: level(value, 4) }, signed(value)));
  const others = [
    ["visible", "words alone"],
    ["gap", "gap"],
    ["steered", "while steered"],
  ].filter(([each]) => each !== kind && !Number.isNaN(conversation.at(each, name, i)));
  tip.replaceChildren(
    make(
      "p",
      {},
      make("q", {}, conversation.tokens[i].replaceAll("\n", "⏎").trim() || "space"),
      make("span", { class: "quiet" }, `${conversation.roles[i]} · token ${conversation.positions[i]}`),
    ),
    own.length + strongest.length
      ? make(
          "dl",
          {},
          own.map((each) => row([each, conversation.at(kind, each, i)], each === name)),
          others.map(([each, words]) =>
            make("div", {}, make("dt", {}, `${name}, ${words}`), make("dd", {}, signed(conversation.at(each, name, i)))),
          ),
          strongest.length ? make("div", { class: "rest" }, make("dt", {}, "strongest others")) : null,
          strongest.map((each) => row(each)),
        )
      : make("p", { class: "quiet" }, "not read"),
  );
  tip.hidden = false;
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const above = box.top - tip.offsetHeight - 6;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(above > 60 ? above : box.bottom + 6)}px)`;
}
addEventListener(
  "scroll",
  () => {
    tip.hidden = true;
  },
  { passive: true, capture: true },
);

/** What the colours mean. */
export const legend = (scale, unit) =>
  make(
    "div",
    {
      class: "legend",
      role: "img",
      "aria-label": `blue is below baseline, red above; full colour at ${plain(scale, scale < 1 ? 2 : 0)} ${unit}`,
    },
    make("span", {}, signed(-scale, scale < 1 ? 2 : 0)),
    make("i", { class: "ramp" }),
    make("span", {}, `${signed(scale, scale < 1 ? 2 : 0)} ${unit}`),
  );
