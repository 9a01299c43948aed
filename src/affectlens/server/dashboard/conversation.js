// A conversation with its readings: tokens that may still be arriving, and for every emotion a column of numbers.

/** A chart shows the mean over so many tokens; single tokens are noise. */
export const STRETCH = 15;

const NOBODY = new Set(["template", "special"]);

/** Numbers that grow: what was not read is NaN. */
class Column {
  constructor() {
    this.values = new Float32Array(64).fill(NaN);
    this.means = new Float32Array(64).fill(NaN);
    this.averaged = 0; // how many means are there
    this.sum = 0;
    this.known = 0;
    this.from = 0; // first token in the sum
  }

  set(i, value) {
    if (i >= this.values.length) {
      for (const name of ["values", "means"]) {
        const longer = new Float32Array(Math.max(2 * this[name].length, i + 1)).fill(NaN);
        longer.set(this[name]);
        this[name] = longer;
      }
    }
    this.values[i] = value;
  }
}

export class Conversation {
  constructor() {
    this.id = "";
    this.tokens = [];
    this.roles = [];
    this.turn = []; // number of the turn of each token, -1 for nobody's
    this.positions = []; // of each token as the server counts
    this.spoken = []; // the tokens that somebody said
    this.alerts = [];
    this.kinds = new Map([["inner", new Map()]]);
    this.unit = "z";
    this.layer = null;
    this.steering = "";
    this.path = { x: [], y: [], done: 0, last: null };
  }

  get length() {
    return this.tokens.length;
  }

  /** From GET /v1/traces/{id} or POST /v1/score. */
  static read(trace) {
    const made = new Conversation();
    Object.assign(made, { id: trace.id, unit: trace.unit ?? "z", layer: trace.layer, steering: trace.steering ?? "" });
    trace.tokens.forEach((text, i) => made.push({ text: text ?? "", role: trace.roles[i] }));
    for (const [kind, key] of [
      ["inner", "scores"],
      ["visible", "visible"],
      ["gap", "gap"],
      ["steered", "steered"],
      ["other", "other"],
    ]) {
      if (!trace[key]) continue;
      for (const [name, values] of Object.entries(trace[key])) {
        const column = made.column(kind, name);
        values.forEach((value, i) => column.set(i, value ?? NaN));
      }
    }
    made.alerts = trace.alerts ?? [];
    return made;
  }

  /** The next token: {text, role, scores: {name: number}, token}. */
  push({ text, role, scores = {}, token }) {
    const i = this.tokens.length;
    this.tokens.push(text);
    this.roles.push(role);
    this.positions.push(token ?? (i ? this.positions[i - 1] + 1 : 0));
    if (NOBODY.has(role)) this.turn.push(-1);
    else {
      const before = this.spoken.length ? this.spoken[this.spoken.length - 1] : -1;
      this.turn.push(before < 0 ? 0 : this.turn[before] + (this.roles[before] !== role ? 1 : 0));
      this.spoken.push(i);
    }
    for (const name in scores) this.column("inner", name).set(i, scores[name] ?? NaN);
  }

  column(kind, name) {
    if (!this.kinds.has(kind)) this.kinds.set(kind, new Map());
    const columns = this.kinds.get(kind);
    if (!columns.has(name)) columns.set(name, new Column());
    return columns.get(name);
  }

  /** The names that were read in one way. */
  names(kind = "inner") {
    return [...(this.kinds.get(kind)?.keys() ?? [])];
  }

  /** Whether there are readings of a kind. */
  has(kind) {
    return this.kinds.has(kind);
  }

  at(kind, name, i) {
    const column = this.kinds.get(kind)?.get(name);
    return column && i < column.values.length ? column.values[i] : NaN;
  }

  /** Trailing means over STRETCH tokens, inside a turn; worked out once for every token. */
  means(kind, name) {
    const column = this.kinds.get(kind)?.get(name);
    if (!column) return null;
    if (column.values.length < this.length) column.set(this.length - 1, NaN);
    for (let i = column.averaged; i < this.length; i++) {
      const turn = this.turn[i];
      if (turn < 0) continue;
      while (column.from < i && (this.turn[column.from] !== turn || i - column.from >= STRETCH)) {
        const leaving = column.values[column.from];
        if (this.turn[column.from] >= 0 && !Number.isNaN(leaving)) {
          column.sum -= leaving;
          column.known -= 1;
        }
        column.from += 1;
      }
      const value = column.values[i];
      if (!Number.isNaN(value)) {
        column.sum += value;
        column.known += 1;
      }
      column.means[i] = column.known ? column.sum / column.known : NaN;
    }
    column.averaged = this.length;
    return column.means;
  }

  /** The mean over the stretch that ends at a token. */
  mean(kind, name, i) {
    const means = this.means(kind, name);
    return means && i >= 0 ? means[i] : NaN;
  }

  /** The turns: {role, start, end} of those that somebody said. */
  turns() {
    const found = [];
    for (const i of this.spoken) {
      const last = found[found.length - 1];
      if (last && last.turn === this.turn[i]) last.end = i + 1;
      else found.push({ turn: this.turn[i], role: this.roles[i], start: i, end: i + 1 });
    }
    return found;
  }

  /** Mean, peak and where the peak stands, of a part of the conversation. */
  summary(kind, name, start, end) {
    const values = this.kinds.get(kind)?.get(name)?.values;
    let sum = 0,
      n = 0,
      peak = -Infinity,
      where = -1;
    for (let i = start; values && i < end && i < values.length; i++) {
      if (Number.isNaN(values[i]) || this.turn[i] < 0) continue;
      sum += values[i];
      n += 1;
      if (values[i] > peak) {
        peak = values[i];
        where = i;
      }
    }
    return n ? { mean: sum / n, peak, where, n } : null;
  }

  /** All emotions at a token, strongest first: [[name, z]], of the mean over the stretch or of the token alone. */
  ranked(i, { kind = "inner", alone = false } = {}) {
    const found = [];
    for (const name of this.names(kind)) {
      const value = alone ? this.at(kind, name, i) : this.mean(kind, name, i);
      if (!Number.isNaN(value)) found.push([name, value]);
    }
    return found.sort((a, b) => b[1] - a[1]);
  }

  /**
   * The way of the conversation through the circumplex: at each spoken token the centre of the emotions that read above
   * baseline, weighted by the square of z, and carried along so that single tokens do not make it jump.
   */
  walk(places) {
    const { path } = this;
    const columns = [...this.kinds.get("inner")]
      .filter(([name]) => places.has(name))
      .map(([name, column]) => [column, places.get(name)]);
    for (; path.done < this.spoken.length; path.done++) {
      const i = this.spoken[path.done];
      let x = 0,
        y = 0,
        total = 0;
      for (const [column, place] of columns) {
        const z = i < column.values.length ? column.values[i] : NaN;
        if (z > 0) {
          const weight = z * z;
          total += weight;
          x += weight * place[0];
          y += weight * place[1];
        }
      }
      if (total)
        path.last = path.last
          ? [path.last[0] + 0.12 * (x / total - path.last[0]), path.last[1] + 0.12 * (y / total - path.last[1])]
          : [x / total, y / total];
      path.x.push(path.last ? path.last[0] : NaN);
      path.y.push(path.last ? path.last[1] : NaN);
    }
    return path;
  }

  /** The token that the server counts as number `position`. */
  find(position) {
    let low = 0,
      high = this.positions.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (this.positions[middle] === position) return middle;
      if (this.positions[middle] < position) low = middle + 1;
      else high = middle - 1;
    }
    return -1;
  }
}
