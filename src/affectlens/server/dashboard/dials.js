// Dials: how strongly to steer towards an emotion, or away from it, within what was measured to be safe.

import { make, button, picker, signed, plain } from "./dom.js";
import { catalog, onCatalog } from "./catalog.js";

const STEP = 0.005;
const UNMEASURED = 0.1; // the ends of a dial whose safe range was not measured, where the server allows more than that

/** How much of its safe range a strength uses up. */
function share(name, strength) {
  const safe = catalog.emotion.get(name)?.safe;
  if (!strength) return 0;
  const end = safe ? (strength > 0 ? safe[1] : -safe[0]) : 0;
  return end > 0 ? Math.abs(strength) / end : Infinity;
}

export class Dials {
  constructor({ onchange = () => {} } = {}) {
    this.onchange = onchange;
    this.strengths = new Map();
    this.rows = make("ul", { class: "dials" });
    this.add = picker("Add a dial", [], (name) => this.set(name, 0), { placeholder: "add an emotion…" });
    this.reset = button(
      "Reset",
      () => {
        this.strengths.forEach((_, name) => this.strengths.set(name, 0));
        this.build();
        this.onchange();
      },
      { kind: "ghost small" },
    );
    this.budget = make("div", { class: "budget" });
    this.node = make(
      "section",
      { class: "panel steer", "aria-label": "Steering" },
      make(
        "header",
        {},
        make("h2", {}, "Steer"),
        make("span", { class: "quiet" }, "in residual norms"),
        make("div", { class: "spring" }),
        this.budget,
        this.reset,
        this.add.node,
      ),
      this.rows,
    );
    onCatalog(() => this.catalogChanged());
  }

  catalogChanged() {
    this.add.offer(catalog.names);
    if (!this.strengths.size && catalog.names.length) {
      const first = ["calm", "desperate"].filter((name) => catalog.emotion.has(name));
      for (const name of first.length ? first : catalog.watched.slice(0, 2)) this.strengths.set(name, 0);
    }
    this.build();
  }

  /** What is asked for: name to strength, without zeros. */
  get mixture() {
    return Object.fromEntries([...this.strengths].filter(([, strength]) => strength !== 0));
  }

  set(name, strength) {
    this.strengths.set(name, strength);
    this.build();
    this.rows.querySelector(`[data-name="${CSS.escape(name)}"] input`)?.focus();
    this.onchange();
  }

  /** What is left of the safe range for one dial while the others stand where they are: shares add up. */
  limits(name) {
    const safe = catalog.emotion.get(name)?.safe;
    if (catalog.unsafe) return [-Infinity, Infinity];
    if (!safe) return [0, 0];
    let used = 0;
    for (const [other, strength] of this.strengths) if (other !== name) used += share(other, strength);
    const left = Math.max(0, 1 - used);
    return [safe[0] * left, safe[1] * left];
  }

  build() {
    this.rows.replaceChildren(...[...this.strengths].map(([name]) => this.row(name)));
    this.mark();
  }

  row(name) {
    const safe = catalog.emotion.get(name)?.safe;
    const far = safe ? Math.max(Math.abs(safe[0]), safe[1]) : UNMEASURED;
    const end = Math.ceil((far * (catalog.unsafe ? 2 : 1.25)) / STEP) * STEP;
    const value = make("output", {});
    const said = make("span", { class: "said", role: "status" });
    const slider = make("input", {
      type: "range",
      min: -end,
      max: end,
      step: STEP,
      value: this.strengths.get(name),
      "aria-label": `Strength of ${name}`,
      disabled: !safe && !catalog.unsafe,
      oninput: () => {
        const asked = Number(slider.value),
          [low, high] = this.limits(name);
        // Towards zero, so that a step never lies beyond the end.
        const kept =
          asked > high ? Math.floor(high / STEP + 1e-6) * STEP : asked < low ? Math.ceil(low / STEP - 1e-6) * STEP : asked;
        const near = Math.abs(kept) < STEP / 2 ? 0 : Math.round(kept / STEP) * STEP;
        said.textContent =
          near !== asked && Math.abs(near - asked) > STEP / 2 ? `${signed(near, 3)} is the end of the safe range` : "";
        slider.value = near;
        this.strengths.set(name, Number(near.toFixed(4)));
        this.mark();
        this.onchange();
      },
    });
    const zone = make("span", { class: "zone" });
    const track = make(
      "span",
      { class: "track" },
      make("span", { class: "rail" }),
      zone,
      make("span", { class: "zero" }),
      make("span", { class: "fill" }),
      slider,
    );
    const node = make(
      "li",
      { data: { name } },
      make("span", { class: "name" }, name),
      track,
      value,
      button(
        `Remove the dial of ${name}`,
        () => {
          this.strengths.delete(name);
          this.build();
          this.onchange();
          this.add.field.focus();
        },
        { sign: "cross", words: false, kind: "ghost tiny" },
      ),
      said,
    );
    if (!safe && !catalog.unsafe)
      said.textContent = "no safe range was measured: run affectlens calibrate, or start the server with --allow-unsafe";
    node.parts = { slider, value, track, end };
    return node;
  }

  /** Numbers, marks and what is left, after a change. */
  mark() {
    let used = 0;
    for (const node of this.rows.children) {
      const { name } = node.dataset,
        strength = this.strengths.get(name),
        { slider, value, track, end } = node.parts;
      const at = (number) => `${(50 + (50 * Math.max(-end, Math.min(end, number))) / end).toFixed(2)}%`;
      const safe = catalog.emotion.get(name)?.safe;
      const [low, high] = catalog.unsafe ? (safe ?? [0, 0]) : this.limits(name);
      value.textContent = signed(strength, 3);
      track.style.setProperty("--low", at(low));
      track.style.setProperty("--high", at(high));
      track.style.setProperty("--from", strength < 0 ? at(strength) : "50%");
      track.style.setProperty("--to", strength < 0 ? "50%" : at(strength));
      const own = share(name, strength);
      node.classList.toggle("beyond", own > 1 + 1e-9);
      node.classList.toggle("plus", strength > 0);
      node.classList.toggle("minus", strength < 0);
      track.title = safe ? `safe from ${signed(safe[0], 3)} to ${signed(safe[1], 3)}` : "no safe range was measured";
      slider.setAttribute("aria-valuetext", `${signed(strength, 3)}, ${track.title}`);
      used += own;
    }
    this.reset.hidden = used === 0;
    const percent = Math.round(100 * used);
    this.budget.replaceChildren(
      ...(used === 0
        ? [make("span", { class: "quiet" }, "nothing is added")]
        : [
            make("span", { class: "meter", vars: { "--share": String(Math.min(1, used)) } }),
            make(
              "span",
              { class: used > 1 + 1e-9 ? "warn" : "quiet" },
              Number.isFinite(used)
                ? used > 1 + 1e-9
                  ? `${plain(used, 1)} times the safe range`
                  : `${percent} % of safe range`
                : "beyond any safe range",
            ),
          ]),
    );
  }
}
