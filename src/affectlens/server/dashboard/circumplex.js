// The emotions in the plane of valence and arousal, with the way that a conversation takes through it.

import { make, framed, colour, series, signed, onTheme } from "./dom.js";

/** Where emotions stand, scaled so that all fit into the circle; those without a place are left out. */
export function placesOf(emotions) {
  const placed = emotions.filter((emotion) => Number.isFinite(emotion.valence) && Number.isFinite(emotion.arousal));
  const far = Math.max(1, ...placed.map((emotion) => Math.hypot(emotion.valence, emotion.arousal)));
  return new Map(placed.map((emotion) => [emotion.id, [emotion.valence / far, emotion.arousal / far]]));
}

export class Circumplex {
  /** `label` says what it shows; `onpick(name)` makes dots clickable; `onhover(name)` is told which one is pointed at. */
  constructor(host, { label, onpick = null, onhover = () => {} }) {
    Object.assign(this, {
      places: new Map(),
      values: () => NaN,
      path: null,
      named: [],
      names: [],
      selected: null,
      groups: null,
      dense: false,
      hovered: null,
    });
    this.canvas = make("canvas", { role: "img", "aria-label": label });
    this.node = make("div", { class: `plane${onpick ? " pick" : ""}` }, this.canvas);
    host.append(this.node);
    this.draw = framed(() => this.paint());
    new ResizeObserver(this.draw).observe(this.node);
    onTheme(this.draw);
    this.node.addEventListener("pointermove", (event) => this.hover(this.nearest(event)));
    this.node.addEventListener("pointerleave", () => this.hover(null));
    if (onpick)
      this.node.addEventListener("click", (event) => {
        const name = this.nearest(event);
        if (name) onpick(name);
      });
    this.onhover = onhover;
  }

  /**
   * What to show: places, values (name to z, for the colour of its dot), path {x, y}, named (the names that are written),
   * names (the watched ones, in the colours of their lines), selected, dense (write as many names as fit), groups (name to
   * whether it is in front).
   */
  set(values) {
    Object.assign(this, values);
    this.draw();
  }

  hover(name) {
    if (name === this.hovered) return;
    this.hovered = name;
    this.onhover(name);
    this.draw();
  }

  nearest(event) {
    const box = this.node.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = null,
      least = 18 * 18;
    for (const [name, place] of this.places) {
      if (this.groups && !this.groups(name)) continue;
      const [x, y] = this.at(place);
      const far = (x - px) ** 2 + (y - py) ** 2;
      if (far < least) [best, least] = [name, far];
    }
    // Names can be pointed at as well as dots.
    return (
      best ??
      this.written?.find(([, left, top, width]) => px >= left && px <= left + width && Math.abs(py - top) < 8)?.[0] ??
      null
    );
  }

  at([x, y]) {
    return [this.middle[0] + this.radius * x, this.middle[1] - this.radius * y];
  }

  paint() {
    const width = this.node.clientWidth,
      height = this.node.clientHeight;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1,
      { canvas } = this;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const font = getComputedStyle(this.node).fontFamily;
    this.radius = Math.max(20, Math.min(width / 2 - (this.dense ? 8 : 14), height / 2 - 18));
    this.middle = [width / 2, height / 2];
    const [cx, cy] = this.middle,
      r = this.radius;

    pen.lineWidth = 1;
    pen.strokeStyle = colour("--grid");
    for (const share of [0.5, 1]) {
      pen.beginPath();
      pen.arc(cx, cy, r * share, 0, 7);
      pen.stroke();
    }
    pen.strokeStyle = colour("--axis");
    pen.beginPath();
    pen.moveTo(cx - r, cy);
    pen.lineTo(cx + r, cy);
    pen.moveTo(cx, cy - r);
    pen.lineTo(cx, cy + r);
    pen.stroke();
    this.taken = [];
    // Dots: red above, blue below baseline, the stronger the larger.
    const dots = [...this.places].map(([name, place]) => [name, ...this.at(place), this.values(name)]);
    dots.sort((a, b) => Math.abs(a[3] || 0) - Math.abs(b[3] || 0));
    for (const [name, x, y, value] of dots) {
      const strength = Number.isNaN(value) ? 0 : Math.min(1, Math.abs(value) / 4);
      const front = !this.groups || this.groups(name);
      pen.globalAlpha = front ? (strength ? 0.35 + 0.65 * strength : 0.55) : 0.12;
      pen.fillStyle = colour(strength < 0.06 ? "--dot" : value > 0 ? "--up" : "--down");
      pen.beginPath();
      pen.arc(x, y, (this.dense ? 2.8 : 1.9) + 4.2 * strength, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;

    if (this.path?.x.length > 1) {
      const { x, y } = this.path,
        n = x.length,
        from = Math.max(0, n - 160);
      pen.strokeStyle = colour("--accent");
      pen.lineCap = "round";
      for (let i = from + 1; i < n; i++) {
        if (Number.isNaN(x[i - 1])) continue;
        const share = (i - from) / (n - from);
        pen.globalAlpha = 0.12 + 0.88 * share * share;
        pen.lineWidth = 0.8 + 1.8 * share;
        pen.beginPath();
        pen.moveTo(...this.at([x[i - 1], y[i - 1]]));
        pen.lineTo(...this.at([x[i], y[i]]));
        pen.stroke();
      }
      pen.globalAlpha = 1;
      const here = this.at([x[n - 1], y[n - 1]]);
      pen.fillStyle = colour("--panel");
      pen.strokeStyle = colour("--accent");
      pen.lineWidth = 2.5;
      pen.beginPath();
      pen.arc(...here, 5, 0, 7);
      pen.fill();
      pen.stroke();
      this.taken.push([here[0] - 6, here[1] - 6, 12, 12]);
    }

    pen.font = `11px ${font}`;
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    pen.lineWidth = 3;
    pen.lineJoin = "round";
    pen.strokeStyle = colour("--panel");
    pen.fillStyle = colour("--quiet");
    for (const [words, x, y, side] of [
      ["stirred up", cx, cy - r - 9, 0.5],
      ["drowsy", cx, cy + r + 9, 0.5],
      ["unpleasant", Math.max(2, cx - r), cy + 10, 0],
      ["pleasant", Math.min(width - 2, cx + r), cy + 10, 1],
    ]) {
      const wide = pen.measureText(words).width,
        left = x - side * wide;
      pen.strokeText(words, left, y);
      pen.fillText(words, left, y);
      this.taken.push([left, y - 7, wide, 14]);
    }

    // Names: the chosen one and the pointed one always, the others where there is room.
    this.written = [];
    const size = this.dense ? 11 : 11.5;
    const first = [this.hovered, this.selected].filter(Boolean);
    const rest = this.dense ? dots.map(([name]) => name).reverse() : [];
    for (const name of new Set([...first, ...this.names, ...this.named, ...rest])) {
      const place = this.places.get(name);
      if (!place || (this.groups && !this.groups(name) && !first.includes(name))) continue;
      const [x, y] = this.at(place);
      const strong = first.includes(name),
        own = this.names.indexOf(name);
      pen.font = `${strong || own >= 0 ? "600 " : ""}${size}px ${font}`;
      const words = name === this.hovered && !Number.isNaN(this.values(name)) ? `${name} ${signed(this.values(name), 1)}` : name;
      const box = this.room(x, y, pen.measureText(words).width, width, height, strong);
      if (strong) {
        pen.strokeStyle = colour("--ink");
        pen.lineWidth = 1.5;
        pen.beginPath();
        pen.arc(x, y, 7, 0, 7);
        pen.stroke();
      }
      if (!box) continue;
      pen.lineWidth = 3;
      pen.strokeStyle = colour("--panel");
      pen.strokeText(words, box[0], box[1] + 6);
      pen.fillStyle = colour(own >= 0 && !this.dense ? series(own) : strong ? "--ink" : this.dense ? "--soft" : "--quiet");
      pen.fillText(words, box[0], box[1] + 6);
      this.written.push([name, box[0], box[1] + 6, box[2]]);
    }
  }

  /** A place for a name beside its dot where nothing stands yet; null when there is none. */
  room(x, y, wide, width, height, always) {
    const near = [
      [6, -6],
      [-wide - 6, -6],
      [-wide / 2, -18],
      [-wide / 2, 7],
      [5, -15],
      [5, 3],
      [-wide - 5, -15],
      [-wide - 5, 3],
    ];
    for (const [dx, dy] of near) {
      const box = [x + dx, y + dy, wide, 12];
      if (box[0] < 2 || box[0] + wide > width - 2 || box[1] < 0 || box[1] + 12 > height) continue;
      if (
        this.taken.some(
          (other) =>
            box[0] < other[0] + other[2] &&
            other[0] < box[0] + box[2] &&
            box[1] < other[1] + other[3] &&
            other[1] < box[1] + box[3],
        )
      )
        continue;
      this.taken.push(box);
      return box;
    }
    return always ? [Math.max(2, Math.min(x + 6, width - wide - 2)), y - 6, wide, 12] : null;
  }
}
