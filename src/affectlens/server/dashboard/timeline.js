// The readings along a conversation: a line for each watched emotion, the thresholds of rules, who speaks, what fired.
//
// Drawn on a canvas once a frame at most. For a keyboard and a screen reader it is a slider over the tokens.

import { make, framed, colour, series, signed, onTheme } from "./dom.js";

const [LEFT, RIGHT, TOP, BOTTOM] = [42, 10, 33, 18];
const DASHES = [[], [6, 3], [2, 2.5], [8, 3, 2, 3]];

export class Timeline {
  /** `oncursor(i)` is told which token is pointed at, null for none; `onpick(i)` which one was chosen. */
  constructor(host, { oncursor = () => {}, onpick = () => {}, height = 172 } = {}) {
    Object.assign(this, { host, oncursor, onpick, names: [], kind: "inner", lines: [], cursor: null, latest: 0, name: "" });
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.slider = make(
      "div",
      {
        class: "timeline",
        tabindex: 0,
        role: "slider",
        "aria-label": "Timeline of the readings: arrow keys go from token to token, Enter shows the token",
        "aria-valuemin": 0,
        "aria-valuemax": 0,
        "aria-valuenow": 0,
        "aria-valuetext": "no token",
        vars: { "--height": `${height}px` },
      },
      this.canvas,
    );
    host.append(this.slider);
    this.draw = framed(() => this.paint());
    new ResizeObserver(this.draw).observe(this.slider);
    onTheme(this.draw);
    this.slider.addEventListener("pointermove", (event) => this.point(this.tokenAt(event)));
    this.slider.addEventListener("pointerleave", () => this.point(null));
    this.slider.addEventListener("click", (event) => {
      const i = this.tokenAt(event);
      if (i !== null) this.onpick(i);
    });
    this.slider.addEventListener("keydown", (event) => this.key(event));
    this.slider.addEventListener("blur", () => this.point(null));
  }

  /** What to show: conversation, names, kind ("inner", …), lines (thresholds), name (the emotion in front), beside, latest. */
  set(values) {
    Object.assign(this, values);
    this.slider.setAttribute("aria-valuemax", Math.max(0, (this.conversation?.spoken.length ?? 0) - 1));
    this.draw();
  }

  /** The part of the spoken tokens that is shown: all, or the latest. */
  get range() {
    const n = this.conversation?.spoken.length ?? 0;
    return [this.latest && n > this.latest ? n - this.latest : 0, n];
  }

  tokenAt(event) {
    const [from, to] = this.range;
    if (to === from) return null;
    const box = this.slider.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / Math.max(1, box.width - LEFT - RIGHT);
    return this.conversation.spoken[
      Math.max(from, Math.min(to - 1, from + Math.round(share * Math.max(this.least - 1, to - from - 1))))
    ];
  }

  get least() {
    return 40; // fewer tokens do not fill the width, so that the first ones do not race across it
  }

  key(event) {
    const [from, to] = this.range;
    if (to === from) return;
    const here = this.cursor === null ? null : this.conversation.spoken.indexOf(this.cursor);
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 20, PageDown: -20 }[event.key];
    let next = null;
    if (step) next = here === null ? (step > 0 ? from : to - 1) : here + step;
    else if (event.key === "Home") next = from;
    else if (event.key === "End") next = to - 1;
    else if (event.key === "Enter" && here !== null) this.onpick(this.cursor);
    if (next === null) return;
    event.preventDefault();
    this.point(this.conversation.spoken[Math.max(from, Math.min(to - 1, next))], true);
  }

  point(i, say = false) {
    if (i === this.cursor) return;
    this.cursor = i;
    if (i !== null) {
      this.slider.setAttribute("aria-valuenow", this.conversation.spoken.indexOf(i));
      const readings = this.names.map((name) => `${name} ${signed(this.conversation.mean(this.kind, name, i), 1)}`).join(", ");
      if (say)
        this.slider.setAttribute(
          "aria-valuetext",
          `token ${this.conversation.positions[i]} ${this.conversation.tokens[i].trim()}, ${readings}`,
        );
    }
    this.oncursor(i);
    this.draw();
  }

  /** Lowest and highest of what is drawn, thresholds among it. */
  extent() {
    const { conversation, kind } = this,
      [from, to] = this.range;
    let [low, high] = [-1, 1];
    for (const line of this.lines) [low, high] = [Math.min(low, line.value), Math.max(high, line.value)];
    const stride = Math.max(1, Math.floor((to - from) / 2000));
    for (const name of this.names) {
      const means = conversation?.means(kind, name);
      for (let n = from; means && n < to; n += stride) {
        const value = means[conversation.spoken[n]];
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    return [low, high];
  }

  paint() {
    const { canvas, conversation, names, kind } = this;
    const width = this.slider.clientWidth,
      height = this.slider.clientHeight;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px " + getComputedStyle(this.slider).fontFamily;
    pen.textBaseline = "middle";
    const [from, to] = this.range;
    const right = width - RIGHT,
      bottom = height - BOTTOM;
    const steps = Math.max(this.least - 1, to - from - 1);
    const x = (n) => LEFT + ((right - LEFT) * (n - from)) / steps;

    let [low, high] = this.extent();
    if (this.peer) [low, high] = [Math.min(low, this.peer.extent()[0]), Math.max(high, this.peer.extent()[1])]; // two that are compared share a scale
    const stride = Math.max(1, Math.floor((to - from) / (2 * width)));
    const z = (conversation?.unit ?? "z") === "z";
    const tick = z ? (high - low > 9 ? 4 : high - low > 4.5 ? 2 : 1) : (high - low) / 4;
    if (z) [low, high] = [Math.floor((low - 0.15) / tick) * tick, Math.ceil((high + 0.15) / tick) * tick];
    const y = (value) => TOP + ((bottom - TOP) * (high - value)) / (high - low);

    pen.lineWidth = 1;
    pen.textAlign = "right";
    for (let value = low; value <= high + 1e-9; value += tick) {
      const at = Math.round(y(value)) + 0.5;
      pen.strokeStyle = colour(Math.abs(value) < 1e-9 ? "--axis" : "--grid");
      pen.beginPath();
      pen.moveTo(LEFT, at);
      pen.lineTo(right, at);
      pen.stroke();
      pen.fillStyle = colour("--quiet");
      pen.fillText(signed(value, z ? 0 : 2), LEFT - 6, at);
    }

    // Who speaks: a lane for each of the two.
    pen.textAlign = "left";
    for (const [lane, role] of ["user", "assistant"].entries()) {
      const top = 4 + 12 * lane;
      pen.fillStyle = colour("--grid");
      pen.fillRect(LEFT, top + 2, right - LEFT, 2);
      pen.fillStyle = colour(role === "user" ? "--quiet" : "--ink");
      for (let n = from; n < to;) {
        let end = n;
        while (end < to && conversation.roles[conversation.spoken[end]] === conversation.roles[conversation.spoken[n]]) end += 1;
        const speaker = conversation.roles[conversation.spoken[n]];
        if (speaker === role || (lane === 1 && speaker === "text"))
          pen.fillRect(x(n), top, Math.max(2, x(end - 1) - x(n) + 1), 6);
        n = end;
      }
      pen.fillStyle = colour("--quiet");
      pen.textAlign = "right";
      pen.fillText(role === "user" ? "user" : "reply", LEFT - 6, top + 3);
    }

    // Thresholds of rules, in the colour of their emotion.
    pen.textAlign = "right";
    const said = [];
    for (const line of this.lines) {
      const n = names.indexOf(line.name);
      if (n < 0) continue;
      const at = Math.round(y(line.value)) + 0.5;
      pen.setLineDash([4, 4]);
      pen.strokeStyle = colour(series(n));
      pen.globalAlpha = line.armed ? 0.9 : 0.45;
      pen.beginPath();
      pen.moveTo(LEFT, at);
      pen.lineTo(right, at);
      pen.stroke();
      pen.setLineDash([]);
      pen.fillStyle = colour(series(n));
      const words = `${line.name} ${line.sign} ${line.value}`.replace("-", "−");
      let place = at - 7;
      while (said.some((other) => Math.abs(other - place) < 11)) place += 12;
      said.push(place);
      pen.lineWidth = 3;
      pen.strokeStyle = colour("--panel");
      pen.strokeText(words, right - 2, place);
      pen.fillText(words, right - 2, place);
      pen.lineWidth = 1;
      pen.globalAlpha = 1;
    }

    if (!conversation || to === from) {
      pen.fillStyle = colour("--quiet");
      pen.textAlign = "center";
      pen.fillText("The readings will be drawn here, token by token", (LEFT + right) / 2, y(0) - 12);
      return;
    }

    // The readings: single tokens faint, the mean over a stretch strong; what the words alone read, dotted.
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP - 2, right - LEFT + 2, bottom - TOP + 4);
    pen.clip();
    pen.lineJoin = "round";
    const trace = (values, spoken) => {
      pen.beginPath();
      let open = false;
      for (let n = from; n < to; n += stride) {
        const value = values[spoken[n]];
        if (Number.isNaN(value)) {
          open = false;
          continue;
        }
        if (open && n > from && conversation.turn[spoken[n]] !== conversation.turn[spoken[n - 1]]) open = false;
        if (open) pen.lineTo(x(n), y(value));
        else pen.moveTo(x(n), y(value));
        open = true;
      }
      pen.stroke();
    };
    const order = names.map((name, n) => [name, n]).sort((a, b) => (a[0] === this.name) - (b[0] === this.name));
    for (const [name, n] of order) {
      const front = name === this.name;
      pen.strokeStyle = colour(series(n));
      const raw = conversation.kinds.get(kind)?.get(name)?.values;
      if (raw && front && (right - LEFT) / steps > 1.2) {
        pen.globalAlpha = 0.28;
        pen.lineWidth = 1;
        trace(raw, conversation.spoken);
      }
      pen.globalAlpha = front || !names.includes(this.name) ? 1 : 0.72;
      pen.lineWidth = front ? 2.4 : 1.5;
      const means = conversation.means(kind, name);
      if (means) trace(means, conversation.spoken);
      const visible = front && kind === "inner" ? conversation.means("visible", name) : null;
      if (visible) {
        pen.setLineDash(DASHES[2]);
        pen.lineWidth = 1.6;
        trace(visible, conversation.spoken);
        pen.setLineDash([]);
      }
      const other = front && this.beside ? this.beside.means("inner", name) : null;
      if (other) {
        // the unsteered reply, from where the steered one begins
        const start = conversation.spoken.findIndex((i) => conversation.turn[i] === this.besideTurn);
        const last = this.beside.turns().find((one) => one.turn === this.besideTurn);
        pen.setLineDash(DASHES[1]);
        pen.lineWidth = 1.4;
        pen.globalAlpha = 0.8;
        pen.beginPath();
        for (let k = last?.start ?? 0, open = false; last && k < last.end; k++) {
          if (Number.isNaN(other[k])) continue;
          const at = [x(start + k - last.start), y(other[k])];
          if (open) pen.lineTo(...at);
          else pen.moveTo(...at);
          open = true;
        }
        pen.stroke();
        pen.setLineDash([]);
      }
      pen.globalAlpha = 1;
    }
    pen.restore();

    // What fired.
    for (const alert of conversation.alerts) {
      const n = conversation.spoken.indexOf(conversation.find(alert.token));
      if (n < from) continue;
      pen.strokeStyle = pen.fillStyle = colour("--alert");
      pen.globalAlpha = 0.55;
      pen.beginPath();
      pen.moveTo(x(n), TOP);
      pen.lineTo(x(n), bottom);
      pen.stroke();
      pen.globalAlpha = 1;
      pen.beginPath();
      pen.moveTo(x(n), TOP + 7);
      pen.lineTo(x(n) - 4.5, TOP - 1);
      pen.lineTo(x(n) + 4.5, TOP - 1);
      pen.fill();
    }

    // The tokens along the bottom.
    pen.fillStyle = colour("--quiet");
    pen.textAlign = "left";
    pen.fillText(`token ${conversation.positions[conversation.spoken[from]]}`, LEFT, height - 7);
    pen.textAlign = "right";
    if (to - from > 12)
      pen.fillText(String(conversation.positions[conversation.spoken[to - 1]]), Math.max(LEFT + 70, x(to - 1) + 2), height - 7);

    if (this.cursor !== null) {
      const n = conversation.spoken.indexOf(this.cursor);
      if (n < from) return;
      pen.strokeStyle = colour("--quiet");
      pen.beginPath();
      pen.moveTo(Math.round(x(n)) + 0.5, TOP);
      pen.lineTo(Math.round(x(n)) + 0.5, bottom);
      pen.stroke();
      for (const [name, k] of order) {
        const value = conversation.mean(kind, name, this.cursor);
        if (Number.isNaN(value)) continue;
        pen.fillStyle = colour(series(k));
        pen.beginPath();
        pen.arc(x(n), y(value), 3.2, 0, 7);
        pen.fill();
      }
    }
  }

  /** Where the cursor is on the screen, for what is shown beside it. */
  place() {
    const [from, to] = this.range,
      box = this.slider.getBoundingClientRect();
    const n = this.conversation.spoken.indexOf(this.cursor) - from;
    const left = box.left + LEFT + ((box.width - LEFT - RIGHT) * n) / Math.max(this.least - 1, to - from - 1);
    return { getClientRects: () => [{ left: left + 10, top: box.top + 4, bottom: box.bottom }] };
  }
}
