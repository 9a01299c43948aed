// Studies: what finished runs found, claim by claim, with figures; two runs beside each other.

import { make, icon, time, count, blank, filled, drawn, choice } from "./dom.js";
import { get } from "./api.js";
import { figures } from "./figures.js";

const VERDICTS = ["holds", "weak", "fails", "untestable"];
const path = (...ids) => `#/studies/${ids.map(encodeURIComponent).join("/")}`;

export function studies() {
  const host = make("div");
  const node = make("section", { class: "page studies" }, host);
  let shown = null;
  return {
    node,
    show([run, other]) {
      const key = JSON.stringify([run, other]);
      if (key === shown && run) return;
      shown = key;
      if (run) opened(host, run, other);
      else listed(host);
    },
  };
}

function listed(host) {
  const place = make("div");
  host.replaceChildren(
    make(
      "header",
      { class: "pagehead" },
      make("h1", { tabindex: -1 }, "Studies"),
      make("span", { class: "quiet" }, "finished runs, newest first"),
    ),
    place,
  );
  filled(place, async () => {
    const { data } = await get("/v1/studies");
    if (!data.length)
      return blank(
        "No finished run",
        "affectlens study MODEL tests the published claims on a model; start the server with --runs DIR to see its runs here.",
      );
    return make(
      "ol",
      { class: "cards runs" },
      data.map((run) =>
        make(
          "li",
          { class: "card" },
          make(
            "a",
            { class: "whole", href: path(run.id) },
            make(
              "header",
              {},
              make("h2", {}, run.model),
              make("span", { class: "mono quiet" }, run.id),
              make("div", { class: "spring" }),
              time(run.created),
            ),
            tally(run.counts ?? { holds: run.holds, other: run.findings - run.holds }),
            make("p", { class: "facts" }, make("span", {}, `${run.holds} of ${count(run.findings, "finding")} hold`)),
          ),
        ),
      ),
    );
  });
}

/** How many findings have which verdict, as a strip. */
const tally = (counts) =>
  make(
    "div",
    { class: "tally" },
    Object.entries(counts)
      .filter(([, n]) => n)
      .map(([verdict, n]) =>
        make(
          "div",
          { class: verdict, vars: { "--n": String(n) } },
          make("i"),
          make("span", {}, verdict === "other" ? count(n, "other") : `${n} ${verdict}`),
        ),
      ),
  );

function opened(host, id, otherId) {
  filled(
    host,
    async () => {
      const [{ data: runs }, run, other] = await Promise.all([
        get("/v1/studies"),
        get(`/v1/studies/${encodeURIComponent(id)}`),
        otherId ? get(`/v1/studies/${encodeURIComponent(otherId)}`) : null,
      ]);
      const counts = (one) =>
        Object.fromEntries(
          VERDICTS.map((verdict) => [verdict, one.findings.filter((finding) => finding.verdict === verdict).length]),
        );
      const against = make(
        "select",
        {
          class: "field",
          "aria-label": "Compare with",
          onchange: () => {
            location.hash = against.value ? path(id, against.value) : path(id);
          },
        },
        make("option", { value: "" }, "no other run"),
        ...runs.filter((one) => one.id !== id).map((one) => make("option", { value: one.id }, `${one.model} · ${one.id}`)),
      );
      against.value = otherId ?? "";
      const place = make("div");
      let verdict = "all";
      const fill = () =>
        place.replaceChildren(
          findings(
            run,
            other,
            (finding) => verdict === "all" || (verdict === "differs" ? differs(finding, other) : finding.verdict === verdict),
          ),
        );
      fill();
      return [
        make("a", { class: "backlink", href: "#/studies" }, icon("back"), make("span", {}, "Studies")),
        make(
          "header",
          { class: "pagehead" },
          make("h1", { tabindex: -1 }, run.title ?? run.model),
          make("div", { class: "spring" }),
          make("label", { class: "labelled inline" }, make("span", {}, "Beside"), against),
        ),
        run.summary && make("p", { class: "lead" }, run.summary),
        make(
          "div",
          { class: other ? "tallies" : "" },
          other && make("h3", {}, run.model),
          tally(counts(run)),
          other && make("h3", {}, name(run, other)),
          other && tally(counts(other)),
        ),
        make(
          "div",
          { class: "row tools" },
          choice(
            "Which findings",
            [["all", "All"], ...VERDICTS.map((each) => [each, each]), ...(other ? [["differs", "verdicts differ"]] : [])],
            "all",
            (value) => {
              verdict = value;
              fill();
            },
          ),
        ),
        place,
        ...(run.figures?.length ? [make("h2", {}, `Figures of ${run.model}`), figures(id, run.figures)] : []),
      ].filter(Boolean);
    },
    { rows: 10 },
  );
}

const name = (run, other) => (other.model === run.model ? `${other.model}, ${other.id}` : other.model);
const same = (finding, other) => other?.findings.find((each) => each.study === finding.study && each.id === finding.id);
const differs = (finding, other) => {
  const its = same(finding, other);
  return Boolean(its) && its.verdict !== finding.verdict;
};

/** Digits that the interval supports. */
function number(value, low, high) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const wide = high - low;
  const digits = wide > 0 ? Math.min(4, Math.max(0, 1 - Math.floor(Math.log10(wide)))) : 3;
  return value.toFixed(digits).replace("-", "−");
}
const interval = (one) =>
  one
    ? [
        make("b", {}, number(one.value, one.low, one.high), one.unit ?? ""),
        make("span", { class: "quiet" }, ` [${number(one.low, one.low, one.high)}, ${number(one.high, one.low, one.high)}]`),
      ]
    : "–";
const chance = (one) =>
  one
    ? `${number(one.value, one.low, one.high)} [${number(one.low, one.low, one.high)}, ${number(one.high, one.low, one.high)}]`
    : "–";
const p = (one) => (one?.p === null || one?.p === undefined ? "–" : one.p < 0.001 ? "< 0.001" : one.p.toPrecision(2));
const cell = (label, value) => make("td", { class: `number${value === "–" ? " none" : ""}`, "data-label": label }, value);
const chip = (verdict) => make("span", { class: `verdict ${verdict}` }, verdict);

/** Interval, the band of chance, and the other run, on one line. */
function picture(finding, its) {
  const { estimate, null: none } = finding;
  if (!estimate || (!none && !its?.estimate)) return "";
  const marks = [
    estimate.low,
    estimate.high,
    ...(none ? [none.low, none.high] : []),
    ...(its?.estimate ? [its.estimate.low, its.estimate.high] : []),
  ];
  if (!marks.every(Number.isFinite)) return "";
  const [low, high] = [Math.min(...marks), Math.max(...marks)];
  if (high <= low) return "";
  const x = (value) => 4 + (92 * (value - low)) / (high - low);
  const svg = drawn("svg", { viewBox: "0 0 100 16", class: "strip", "aria-hidden": "true" });
  if (none)
    svg.append(
      drawn("rect", { class: "band", x: x(none.low), y: 1, width: Math.max(1, x(none.high) - x(none.low)), height: 14, rx: 1.5 }),
    );
  const line = (one, y, kind) =>
    svg.append(
      drawn("line", { class: kind, x1: x(one.low), x2: x(one.high), y1: y, y2: y }),
      drawn("circle", { class: kind, cx: x(one.value), cy: y, r: 2.8 }),
    );
  line(estimate, its?.estimate ? 5 : 8, "own");
  if (its?.estimate) line(its.estimate, 11, "its");
  return svg;
}

function findings(run, other, wanted) {
  const groups = new Map();
  for (const finding of run.findings)
    if (wanted(finding)) groups.set(finding.study, [...(groups.get(finding.study) ?? []), finding]);
  if (!groups.size) return blank("No finding of this kind", "");
  const heads = [
    "Finding",
    "Published",
    other ? run.model : "Here",
    "",
    ...(other ? [name(run, other)] : ["Chance or control"]),
    "p",
    ...(other ? [] : ["n"]),
    "Verdict",
  ];
  const row = (finding) => {
    const its = other && same(finding, other),
      { estimate } = finding;
    return make(
      "tr",
      {},
      make(
        "td",
        { class: "claim" },
        make(
          "details",
          {},
          make("summary", {}, finding.claim),
          finding.note && make("p", {}, finding.note),
          make("p", {}, make("b", {}, "Rule. "), finding.rule),
          finding.null && make("p", {}, make("b", {}, "Null. "), `${finding.null.kind}, ${finding.null.draws} draws`),
        ),
      ),
      cell("Published", finding.published ?? "–"),
      cell(other ? run.model : "Here", interval(estimate)),
      make("td", { class: "picture" }, picture(finding, its)),
      other ? cell(name(run, other), interval(its?.estimate)) : cell("Chance", chance(finding.null)),
      cell("p", p(finding.null)),
      other ? null : cell("n", estimate ? estimate.n.toLocaleString("en").replaceAll(",", "\u202f") : "–"),
      make(
        "td",
        { "data-label": "Verdict" },
        chip(finding.verdict),
        other && its && its.verdict !== finding.verdict ? [" ", chip(its.verdict)] : null,
      ),
    );
  };
  return make(
    "div",
    { class: "scrollx", tabindex: 0, role: "region", "aria-label": "Findings" },
    make(
      "table",
      { class: "findings" },
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          heads.map((head, n) =>
            make(
              "th",
              { scope: "col", class: n && n < heads.length - 1 ? "number" : "" },
              head || make("span", { class: "hidden" }, "Picture"),
            ),
          ),
        ),
      ),
      [...groups].map(([study, list]) =>
        make(
          "tbody",
          {},
          make("tr", { class: "group" }, make("th", { colspan: heads.length, scope: "rowgroup" }, study.replaceAll("_", " "))),
          list.map(row),
        ),
      ),
    ),
  );
}
