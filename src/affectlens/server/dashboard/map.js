// Map: all emotions in the plane and as clusters; one of them with what is known about it.

import { make, icon, tabs, signed, passage, blank, filled, drawn } from "./dom.js";
import { get } from "./api.js";
import { catalog, onCatalog } from "./catalog.js";
import { Circumplex, placesOf } from "./circumplex.js";

const path = (name) => `#/map/${encodeURIComponent(name)}`;
const go = (name) => {
  location.hash = path(name);
};

export function map() {
  let selected = null,
    similar = new Map(),
    missing = "";
  const find = make("input", {
    type: "search",
    class: "field",
    placeholder: "Find an emotion",
    "aria-label": "Find an emotion",
    oninput: () => narrow(),
    onkeydown: (event) => {
      const first = event.key === "Enter" && names()[0];
      if (first) go(first);
    },
  });
  const clusters = make("div", { class: "clusters" });
  const planeHost = make("div", { class: "planehost" });
  const set = tabs("View", [
    ["plane", "Circumplex", planeHost],
    ["clusters", "Clusters", clusters],
  ]);
  const detail = make("aside", { class: "about", "aria-label": "About the chosen emotion" });
  const tally = make("span", { class: "quiet" });
  const node = make(
    "section",
    { class: "page map" },
    make(
      "header",
      { class: "pagehead" },
      make("h1", { tabindex: -1 }, "Map"),
      tally,
      make("div", { class: "spring" }),
      find,
      set.node,
    ),
    make("div", { class: "board" }, planeHost, clusters),
    make("div", { class: "side" }, detail),
  );
  const plane = new Circumplex(planeHost, {
    label: "All emotions in the plane of valence and arousal; the view Clusters lists them as buttons",
    onpick: go,
  });
  const note = make("p", { class: "quiet planenote" });
  planeHost.append(note);
  set.show("plane");

  const wanted = () => find.value.trim().toLowerCase();
  const names = () =>
    catalog.names
      .filter((name) => name.toLowerCase().includes(wanted()))
      .sort((a, b) => a.toLowerCase().indexOf(wanted()) - b.toLowerCase().indexOf(wanted()));

  function narrow() {
    const some = wanted();
    plane.set({ groups: some ? (name) => name.toLowerCase().includes(some) : null });
    for (const chip of clusters.querySelectorAll("a"))
      chip.classList.toggle("faint", Boolean(some) && !chip.textContent.toLowerCase().includes(some));
  }

  onCatalog(() => {
    const places = placesOf(catalog.emotions);
    const without = catalog.names.length - places.size;
    tally.textContent = `${catalog.names.length} emotions, read at layer ${catalog.layer}`;
    missing = without ? ` ${without} emotions have no place in this plane; Clusters has them all.` : "";
    plane.set({ places, dense: true });
    const groups = new Map();
    for (const emotion of catalog.emotions) {
      const cluster = emotion.cluster ?? "Without a cluster";
      groups.set(cluster, [...(groups.get(cluster) ?? []), emotion.id]);
    }
    const sorted = [...groups].sort((a, b) => b[1].length - a[1].length);
    clusters.replaceChildren(
      ...sorted.map(([cluster, list]) =>
        make(
          "section",
          { class: "cluster" },
          make("h2", {}, cluster, make("span", { class: "quiet" }, ` ${list.length}`)),
          make(
            "div",
            { class: "cloud" },
            list.sort((a, b) => a.localeCompare(b)).map((name) => make("a", { href: path(name), data: { name } }, name)),
          ),
        ),
      ),
    );
    chosen();
  });

  function chosen() {
    note.textContent =
      (selected
        ? "Colour: likeness to the chosen emotion, red alike and blue contrary."
        : "Each emotion where valence and arousal put it.") + missing;
    plane.set({ selected, values: (name) => (name === selected ? 4 : 4 * (similar.get(name) ?? NaN)) });
    for (const chip of clusters.querySelectorAll("a")) {
      if (chip.dataset.name === selected) chip.setAttribute("aria-current", "true");
      else chip.removeAttribute("aria-current");
    }
  }

  async function open(name) {
    selected = name;
    similar = new Map();
    chosen();
    await filled(detail, async () => {
      const facts = await get(`/v1/emotions/${encodeURIComponent(name)}`);
      if (selected === name) {
        similar = new Map(facts.neighbours);
        chosen();
      }
      return about(facts);
    });
  }

  return {
    node,
    show([name]) {
      if (name) open(name);
      else {
        selected = null;
        similar = new Map();
        chosen();
        detail.replaceChildren(
          blank(
            "Choose an emotion",
            "Its neighbours, the words it promotes, its safe range and the strongest passages of stored conversations will stand here.",
          ),
        );
      }
    },
  };
}

function about(facts) {
  const neighbours = facts.neighbours ?? [];
  const far = Math.max(0.2, ...neighbours.map(([, cosine]) => Math.abs(cosine)));
  return [
    make(
      "header",
      { class: "abouthead" },
      make("h2", {}, facts.id),
      make("span", { class: "quiet" }, facts.cluster ?? "without a cluster"),
    ),
    facts.definition && make("p", { class: "definition" }, facts.definition),
    make(
      "dl",
      { class: "pairs" },
      [
        ["valence", signed(facts.valence)],
        ["arousal", signed(facts.arousal)],
      ].map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    ),
    make(
      "div",
      { class: "row" },
      make(
        "a",
        { class: "button", href: `#/live?watch=${encodeURIComponent(facts.id)}` },
        icon("live"),
        make("span", {}, "Watch it live"),
      ),
      make(
        "a",
        { class: "button", href: `#/live?steer=${encodeURIComponent(facts.id)}` },
        icon("dials"),
        make("span", {}, "Steer with it"),
      ),
      make("a", { class: "button ghost", href: `#/history?emotion=${encodeURIComponent(facts.id)}&above=3` }, "Peaks in History"),
    ),
    make("h3", {}, "Safe range of steering"),
    safe(facts.safe),
    make("h3", {}, "Neighbours"),
    neighbours.length
      ? make(
          "ol",
          { class: "bars links" },
          [
            ...neighbours.filter(([, cosine]) => cosine >= 0).slice(0, 8),
            ...neighbours.filter(([, cosine]) => cosine < 0).slice(-3),
          ].map(([name, cosine]) => bar(name, cosine, far)),
        )
      : make("p", { class: "quiet" }, "none known"),
    make("h3", {}, "Lens: words that it promotes, and that it suppresses"),
    lens(facts.lens),
    make("h3", {}, "Strongest passages in stored conversations"),
    passages(facts),
  ].filter(Boolean);
}

function bar(name, value, far) {
  const row = make(
    "li",
    {},
    make("a", { class: "link", href: path(name) }, name),
    make(
      "span",
      { class: "bar" },
      make("i", { class: value > 0 ? "up" : "down", vars: { "--share": String(Math.min(1, Math.abs(value) / far)) } }),
    ),
    make("b", {}, signed(value)),
  );
  return row;
}

function safe(range) {
  if (!range) return make("p", { class: "quiet" }, "Not measured. affectlens calibrate finds it.");
  const [low, high] = range,
    end = 1.25 * Math.max(-low, high);
  const x = (value) => (100 * (value + end)) / (2 * end);
  return make(
    "figure",
    { class: "safe" },
    drawn(
      "svg",
      { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawn("rect", { x: 0, y: 4, width: 100, height: 2, class: "rail" }),
      drawn("rect", { x: x(low), y: 3, width: x(high) - x(low), height: 4, class: "zone" }),
      drawn("rect", { x: 49.8, y: 1, width: 0.4, height: 8, class: "zero" }),
    ),
    make(
      "figcaption",
      {},
      make("span", {}, "from ", make("b", {}, signed(low, 3)), " to ", make("b", {}, signed(high, 3))),
      make("span", { class: "quiet" }, "in mean residual norms"),
    ),
  );
}

function lens(found) {
  if (!found) return make("p", { class: "quiet" }, "No lens was computed for this model.");
  const words = (list, kind) =>
    make(
      "p",
      { class: `lens ${kind}` },
      list.slice(0, 14).map((entry) => make("code", {}, String([entry].flat()[0]).replaceAll("\n", "⏎").trim() || "space")),
    );
  return make("div", {}, words(found.up ?? [], "up"), words(found.down ?? [], "down"));
}

function passages(facts) {
  const list = facts.passages ?? [];
  if (!list.length) return make("p", { class: "quiet" }, "Nothing stored reads high on it yet.");
  return make(
    "ol",
    { class: "passages" },
    list.slice(0, 8).map((one) => {
      return make(
        "li",
        {},
        make(
          "a",
          { href: `#/history/${encodeURIComponent(one.trace)}?token=${one.token}` },
          make("span", { class: "quote", dir: "auto" }, passage(one.words)),
          make("span", { class: "quiet" }, `${one.speaker ?? ""} `, make("b", {}, signed(one.score, 1))),
        ),
      );
    }),
  );
}
