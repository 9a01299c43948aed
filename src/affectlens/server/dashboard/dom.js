// What pages are made of. Whatever comes from a model, a user or a file becomes text here: there is no way to write markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. Attributes whose value is null, undefined or false are left out; `data`, `vars` (custom properties of its style)
 * and `on…` (listeners) take objects and functions. Children are nodes or text.
 */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "data") Object.assign(node.dataset, value);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else if (name === "href" && !/^(#|\/(?!\/)|blob:)/.test(value)) throw new Error(`a link that leaves this server: ${value}`);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const PATHS = {
  live: "M2 8h3l2-5 3 10 2-5h2",
  history: "M8 4.5V8l2.4 1.6M3 8a5.2 5.2 0 1 0 1.6-3.8L3 5.6M3 2.8v2.8h2.8",
  alerts: "M4 11V7.2a4 4 0 0 1 8 0V11l1.2 1.5H2.8zM6.6 14.2h2.8",
  map: "M8 2v12M2 8h12M8 13.2A5.2 5.2 0 1 0 8 2.8a5.2 5.2 0 0 0 0 10.4z",
  studies: "M3 13V8.5M6.5 13V5M10 13V9.5M13.5 13V3M2 13.8h12.5",
  system: "M2.5 3.5h11v7.5h-11zM6 13.5h4",
  light:
    "M8 5.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6zM8 1.5v1.2M8 13.3v1.2M1.5 8h1.2M13.3 8h1.2M3.4 3.4l.9.9M11.7 11.7l.9.9M12.6 3.4l-.9.9M4.3 11.7l-.9.9",
  dark: "M13 9.6A5.6 5.6 0 0 1 6.4 3 5.6 5.6 0 1 0 13 9.6z",
  send: "M8 13V3.5M4 7.2 8 3.2l4 4",
  stop: "M4.5 4.5h7v7h-7z",
  plus: "M8 3.5v9M3.5 8h9",
  cross: "M4.2 4.2l7.6 7.6M11.8 4.2l-7.6 7.6",
  down: "M4 6.2 8 10l4-3.8",
  back: "M9.8 4 6 8l3.8 4",
  save: "M8 2.8v7M5 7.2l3 3 3-3M3 12.8h10",
  search: "M7 11.4a4.4 4.4 0 1 0 0-8.8 4.4 4.4 0 0 0 0 8.8zM10.4 10.4l3.2 3.2",
  check: "M3.5 8.4 6.6 11.5 12.8 4.8",
  mute: "M4 11V7.2a4 4 0 0 1 6.6-3M12 7.4V11l1.2 1.5H5M6.6 14.2h2.8M2.5 2.5l11 11",
  flag: "M4 14V2.8M4 3.4h7.6L10 6.2l1.6 2.8H4",
  columns: "M2.5 3h4.6v10H2.5zM8.9 3h4.6v10H8.9z",
  page: "M4 2.5h5.5L12 5v8.5H4zM9.2 2.7V5.4H12",
  dials: "M2.5 5h7M12.5 5h1M2.5 11h1M6.5 11h7M11 3.4v3.2M5 9.4v3.2",
};

/** A drawn sign of 16 pixels; what it means has to stand beside it, or in the label of its button. */
export function icon(name) {
  const node = document.createElementNS(SVG, "svg");
  node.setAttribute("viewBox", "0 0 16 16");
  node.setAttribute("aria-hidden", "true");
  node.classList.add("icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  node.append(path);
  return node;
}

export const drawn = (tag, attributes, ...children) => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

/** A button that shows a sign, or a sign and words. */
export const button = (label, onclick, { sign, kind = "", words = true, ...more } = {}) =>
  make(
    "button",
    {
      type: "button",
      class: `button ${kind}${words ? "" : " bare"}`,
      onclick,
      "aria-label": words ? null : label,
      title: words ? null : label,
      ...more,
    },
    sign && icon(sign),
    words && make("span", {}, label),
  );

/** Do something at the next frame, once, however often it is asked for until then. */
export function framed(work) {
  let asked = 0;
  return () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      work();
    });
  };
}

/** Do something soon, and not more often than every so many milliseconds. */
export function throttled(work, wait) {
  let timer = 0,
    last = 0;
  return () => {
    timer ||= setTimeout(
      () => {
        timer = 0;
        last = performance.now();
        work();
      },
      Math.max(0, last + wait - performance.now()),
    );
  };
}

/** Do something once nobody has asked for it for so many milliseconds. */
export function settled(work, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, wait);
  };
}

/** Tell a screen reader. */
export function announce(text) {
  document.getElementById("announce").textContent = text;
}

/** A message in the corner that goes away by itself; one that needs an answer belongs into its page. */
export function toast(text, { kind = "", href = null } = {}) {
  const close = () => node.remove();
  const node = make(
    "div",
    { class: `toast ${kind}`, role: kind === "bad" ? "alert" : "status" },
    kind === "alert" && icon("flag"),
    make("span", {}, text),
    href && make("a", { href, onclick: close }, "Open"),
    button("Dismiss", close, { sign: "cross", words: false, kind: "ghost small" }),
  );
  const all = document.getElementById("toasts");
  while (all.children.length > 2) all.firstChild.remove();
  all.append(node);
  setTimeout(close, 8000);
}

// ── parts that several pages have ──

let tabSets = 0;

/**
 * Tabs with one stop for the keyboard: arrows move, Home and End jump.
 * Each is [id, title, panel]; `onshow(id)` is called when one is opened.
 */
export function tabs(label, list, onshow = () => {}) {
  const set = ++tabSets;
  const show = (id, focus = false) => {
    for (const [own, , panel] of list) {
      const tab = buttons.get(own);
      tab.setAttribute("aria-selected", own === id);
      tab.tabIndex = own === id ? 0 : -1;
      panel.hidden = own !== id;
      if (own === id && focus) tab.focus();
    }
    onshow(id);
  };
  const buttons = new Map(
    list.map(([id, title, panel]) => {
      const tab = make(
        "button",
        { type: "button", role: "tab", id: `tab-${set}-${id}`, "aria-controls": `panel-${set}-${id}`, onclick: () => show(id) },
        title,
      );
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      panel.id = `panel-${set}-${id}`;
      return [id, tab];
    }),
  );
  const node = make(
    "div",
    {
      class: "tabs",
      role: "tablist",
      "aria-label": label,
      onkeydown: (event) => {
        const ids = list.map(([id]) => id),
          at = ids.findIndex((id) => buttons.get(id) === document.activeElement);
        const to = {
          ArrowRight: (at + 1) % ids.length,
          ArrowLeft: (at + ids.length - 1) % ids.length,
          Home: 0,
          End: ids.length - 1,
        }[event.key];
        if (to === undefined || at < 0) return;
        event.preventDefault();
        show(ids[to], true);
      },
    },
    ...buttons.values(),
  );
  return { node, show };
}

let groups = 0;

/** A choice between few: radio buttons, drawn as one strip. `options` are [value, words]. */
export function choice(label, options, chosen, onchange) {
  const name = `choice-${++groups}`;
  return make(
    "fieldset",
    { class: "choice", onchange: (event) => onchange(event.target.value) },
    make("legend", { class: "hidden" }, label),
    options.map(([value, words]) =>
      make("label", {}, make("input", { type: "radio", name, value, checked: value === chosen }), make("span", {}, words)),
    ),
  );
}

/** A field to choose one of many names by typing; `onpick` gets a name that exists. */
export function picker(label, names, onpick, { placeholder = label } = {}) {
  const id = `picker-${++groups}`;
  const known = new Map();
  const list = make("datalist", { id });
  const field = make("input", {
    type: "text",
    class: "field picker",
    list: id,
    "aria-label": label,
    placeholder,
    autocomplete: "off",
    spellcheck: "false",
  });
  const offer = (all) => {
    known.clear();
    all.forEach((name) => known.set(name.toLowerCase(), name));
    list.replaceChildren(...all.map((name) => make("option", { value: name })));
  };
  const take = (event) => {
    const name = known.get(field.value.trim().toLowerCase());
    field.setCustomValidity(field.value.trim() && !name ? "no such emotion" : "");
    // While typing, a name that begins another one is not taken yet; choosing from the list and Enter are.
    if (!name || (event.type === "input" && event.inputType !== undefined && event.inputType !== "insertReplacementText")) return;
    field.value = "";
    onpick(name);
  };
  field.addEventListener("input", take);
  field.addEventListener("change", take);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      take(event);
    }
  });
  offer(names);
  return { node: make("span", { class: "picking" }, field, list), field, offer };
}

/** A button that opens a short list of things to do: [words, action]. It opens upwards where there is no room below. */
export function menu(words, sign, kind, entries) {
  const list = make(
    "div",
    {},
    entries.map(([said, action]) =>
      button(
        said,
        () => {
          node.open = false;
          action();
        },
        { kind: "ghost" },
      ),
    ),
  );
  const node = make(
    "details",
    {
      class: "menu",
      ontoggle: () => {
        node.classList.remove("above");
        if (node.open) node.classList.toggle("above", list.getBoundingClientRect().bottom > innerHeight - 60);
      },
    },
    make("summary", { class: `button ${kind}` }, icon(sign), make("span", {}, words)),
    list,
  );
  return node;
}
const OPEN = "details:is(.menu, .options)[open]";
document.addEventListener("click", (event) => {
  for (const open of document.querySelectorAll(OPEN)) if (!open.contains(event.target)) open.open = false;
});
document.addEventListener("keydown", (event) => {
  const open = event.key === "Escape" && event.target.closest?.(OPEN);
  if (!open) return;
  open.open = false;
  open.querySelector("summary").focus();
});

/** What stands where something will be: the reason, and what to do. */
export const blank = (title, text, ...more) =>
  make("div", { class: "blank" }, make("h2", {}, title), text && make("p", {}, text), ...more);

/** Grey bars in the shape of what is being loaded. */
export const loading = (rows = 4) =>
  make(
    "div",
    { class: "skeleton", role: "status" },
    make("span", { class: "hidden" }, "Loading"),
    Array.from({ length: rows }, () => make("i")),
  );

/** What went wrong, in the server's own words, and a way to try again. */
export const broken = (error, again) =>
  blank(error.title ?? "This could not be loaded", error.message, again && button("Try again", again));

/** Fill a place with what a promise gives: grey bars until then, an error with a retry if it fails. */
export async function filled(host, load, { rows } = {}) {
  const turn = (host.turn = (host.turn ?? 0) + 1);
  const late = setTimeout(
    () => {
      if (host.turn === turn) host.replaceChildren(loading(rows));
    },
    host.childNodes.length ? 250 : 0,
  );
  try {
    const found = await load();
    if (host.turn === turn) host.replaceChildren(...[found].flat());
  } catch (error) {
    if (error.name !== "AbortError" && host.turn === turn)
      host.replaceChildren(broken(error, () => filled(host, load, { rows })));
  } finally {
    clearTimeout(late);
  }
}

/** The words up to the token, the last of them marked. */
export function passage(words = "") {
  if (!words) return make("span", { class: "quiet" }, "the text is not kept");
  const cut = words.search(/\S+\s*$/);
  return ["…", words.slice(0, cut), make("mark", {}, words.slice(cut))];
}

// ── numbers and times in words ──

export const signed = (value, digits = 2) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
};

export const plain = (value, digits = 2) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits).replace("-", "−");

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en").replaceAll(",", "\u202f")} ${n === 1 ? one : many}`;

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const FULL = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** A time as people say it, with the whole of it on hover. */
export function time(iso) {
  const date = new Date(iso),
    ago = (Date.now() - date) / 1000;
  if (Number.isNaN(ago)) return make("span", {}, "–");
  const today = new Date().toDateString() === date.toDateString();
  const words =
    ago < 50 && ago > -5
      ? "just now"
      : ago < 3600 && ago > 0
        ? `${Math.round(ago / 60)} min ago`
        : today
          ? CLOCK.format(date)
          : `${DAY.format(date)}, ${CLOCK.format(date)}`;
  return make("time", { datetime: date.toISOString(), title: FULL.format(date) }, words);
}

// ── colours for canvases ──

const probe = document.createElement("i");
let resolved = new Map();

/** The value of a colour variable, as it is in the colours of now. */
export function colour(name) {
  if (!resolved.has(name)) {
    if (!probe.isConnected) {
      probe.hidden = true;
      document.documentElement.append(probe);
    }
    probe.style.color = `var(${name})`;
    resolved.set(name, getComputedStyle(probe).color);
  }
  return resolved.get(name);
}

const recoloured = new Set();
const dark = matchMedia("(prefers-color-scheme: dark)");
/** Do something when the colours change, for as long as it does not answer false. */
export const onTheme = (work) => {
  recoloured.add(work);
};
export const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
export function themeChanged() {
  resolved = new Map();
  for (const work of recoloured) if (work() === false) recoloured.delete(work);
}
dark.addEventListener("change", themeChanged);

export const SERIES = 8;
/** The colour of the n-th line, the same everywhere. */
export const series = (n) => `--line-${n % SERIES}`;
