// History: find stored conversations, open one with all that is read in it, put two side by side, take them away as files.

import { make, button, icon, count, signed, plain, time, blank, filled, menu, settled, toast } from "./dom.js";
import { get, query, download, hasKey } from "./api.js";
import { catalog, onCatalog } from "./catalog.js";
import { Conversation } from "./conversation.js";
import { Reader } from "./reader.js";
import { level } from "./transcript.js";

const PAGE = 50;
const path = (id) => `#/history/${encodeURIComponent(id)}`;
const SAID = { stop: "finished", length: "reached its longest length", stopped: "stopped by a rule", timeout: "ended by the time limit", shutdown: "ended because the server shut down", read: "only read" };

export function history() {
  const list = make("div", { class: "listing" });
  const detail = make("div", { class: "opened" });
  const node = make("section", { class: "page history" }, list, detail);
  const found = searching(list);
  const opened = new Map(); // what stands in the detail: a conversation or two

  return {
    node,
    show(parts, params) {
      const [first, second] = parts;
      list.hidden = Boolean(first);
      detail.hidden = !first;
      if (!first) return found.show(params);
      const key = [first, second].filter(Boolean).join(" ");
      if (!opened.has(key)) {
        opened.clear();
        opened.set(key, second ? comparison(detail, first, second) : single(detail, first));
      }
      opened.get(key).then((view) => view?.at(params.get("token")), () => {});
    },
  };
}

// ── the list ──

function searching(host) {
  const chosen = new Map(); // those that are to be compared
  const form = make("form", { class: "filters", role: "search", onsubmit: (event) => { event.preventDefault(); apply(); }, onchange: () => apply() });
  const input = (name, label, type, kind, more = {}) => make("label", { class: `labelled ${kind}` }, make("span", {}, label), make("input", { class: "field", type, name, ...more }));
  const words = input("q", "Words", "search", "grow", { placeholder: "in prompt or reply" });
  const emotion = make("select", { class: "field", name: "emotion", "aria-label": "Emotion" });
  const alert = make("select", { class: "field", name: "alert", "aria-label": "Alert" });
  const above = make("input", { class: "field", type: "number", name: "above", step: "0.5", placeholder: "any", "aria-label": "Peak above, in z" });
  const clear = button("Clear", () => { form.reset(); apply(); }, { kind: "ghost" });
  const unfold = button("Filters", () => unfold.setAttribute("aria-expanded", form.classList.toggle("all")), { kind: "unfold", "aria-expanded": "false" }); // on a phone
  form.append(words, unfold, make("label", { class: "labelled fold" }, make("span", {}, "Emotion"), emotion), make("label", { class: "labelled short fold" }, make("span", {}, "Peak above"), above),
    make("label", { class: "labelled fold" }, make("span", {}, "Alert"), alert), input("since", "Since", "datetime-local", "when fold"), input("until", "Until", "datetime-local", "when fold"),
    make("button", { class: "hidden", type: "submit", tabindex: -1 }, "Search"), clear);
  words.addEventListener("input", settled(() => apply(), 350));
  onCatalog(() => {
    const [was, had] = [emotion.value, alert.value];
    emotion.replaceChildren(make("option", { value: "" }, "any"), ...catalog.names.map((name) => make("option", { value: name }, name)));
    alert.replaceChildren(make("option", { value: "" }, "with or without"), make("option", { value: "any" }, "any alert"), ...catalog.rules.map((rule) => make("option", { value: rule.name }, rule.name)));
    [emotion.value, alert.value] = [was, had];
  });

  const results = make("ol", { class: "results", "aria-label": "Conversations" });
  const place = make("div", {}, results);
  const more = button("Show more", () => load(false));
  more.hidden = true;
  const together = button("Compare", () => { location.hash = `${path([...chosen.keys()][0])}/${encodeURIComponent([...chosen.keys()][1])}`; }, { sign: "columns", kind: "main" });
  const unselect = button("Clear selection", () => { chosen.clear(); host.querySelectorAll(".results input").forEach((box) => { box.checked = false; }); tell(); }, { kind: "ghost small" });
  const bar = make("div", { class: "selection", role: "status" });
  const files = menu("Export", "save", "", [["All as JSONL", () => save("jsonl", "affectlens-traces.jsonl")], ["For Langfuse, JSONL", () => save("langfuse", "affectlens-langfuse.jsonl")]]);
  host.append(make("header", { class: "pagehead" }, make("h1", { tabindex: -1 }, "History"), make("div", { class: "spring" }), files), form, bar, place, make("div", { class: "centre" }, more));

  const instant = (text) => (text ? new Date(text).toISOString() : "");
  const values = () => {
    const given = Object.fromEntries(new FormData(form));
    return { ...given, since: instant(given.since), until: instant(given.until) };
  };
  function save(format, name) {
    const { since, until } = values();
    download(query("/v1/traces/export", { format, since, until }), name).catch((error) => toast(error.message, { kind: "bad" }));
  }

  function apply() {
    const { since, until, ...rest } = Object.fromEntries(new FormData(form));
    const next = query("#/history", { ...rest, since, until });
    clear.hidden = next === "#/history";
    if (location.hash !== next) window.history.replaceState(null, "", next);
    load(true);
  }

  let next = null, wanted = 0;
  async function load(anew) {
    const turn = ++wanted;
    if (anew) {
      more.hidden = true;
      await filled(place, async () => {
        const page = await get(query("/v1/traces", { ...values(), limit: PAGE }));
        if (turn !== wanted) throw Object.assign(new Error(), { name: "AbortError" });
        next = page.next;
        more.hidden = !next;
        if (!page.data.length) return nothing();
        results.replaceChildren(...page.data.map(row));
        return results;
      }, { rows: 8 });
      return;
    }
    more.disabled = true;
    try {
      const page = await get(query("/v1/traces", { ...values(), limit: PAGE, after: next }));
      const rows = page.data.map(row);
      results.append(...rows);
      rows[0]?.querySelector("a").focus();
      next = page.next;
      more.hidden = !next;
    } catch (error) {
      toast(error.message, { kind: "bad" });
    }
    more.disabled = false;
  }

  const nothing = () => Object.values(values()).some(Boolean)
    ? blank("No conversation matches", "Fewer filters find more; peaks are those of the highest token.", button("Clear the filters", () => { form.reset(); apply(); }))
    : blank("Nothing is stored yet", "Every reply of this server is kept here with its readings. Say something on the live page, or point an OpenAI client at this address.", make("a", { class: "button main", href: "#/live" }, "Go to Live"));

  function row(one) {
    const box = make("input", { type: "checkbox", "aria-label": `Compare ${one.title || one.id}`, onchange: () => {
      if (box.checked) chosen.set(one.id, one);
      else chosen.delete(one.id);
      if (chosen.size > 2) {
        const oldest = [...chosen.keys()][0];
        chosen.delete(oldest);
        const old = results.querySelector(`[data-id="${CSS.escape(oldest)}"] input`);
        if (old) old.checked = false;
      }
      tell();
    } });
    box.checked = chosen.has(one.id);
    const peaks = Object.entries(one.peaks ?? {}).slice(0, 4);
    return make("li", { data: { id: one.id } }, make("label", { class: "tick" }, box), make("a", { class: "what", href: path(one.id) },
      make("b", { dir: "auto" }, one.title || "(text is not kept)"),
      make("span", { class: "facts" }, time(one.created), make("span", {}, one.kind), make("span", {}, one.model), make("span", {}, count(one.tokens, "token")),
        one.finish === "stopped" && make("span", { class: "warn" }, "stopped by a rule"), one.steering && Object.keys(one.steering).length ? make("span", {}, `steered: ${steering(one.steering)}`) : null)),
    make("span", { class: "reads" }, (one.top ?? []).slice(0, 3).map((entry) => make("span", {}, [entry].flat()[0]))),
    make("span", { class: "peaks" }, peaks.map(([name, z]) => make("span", { class: `peak ${level(z, 6)}`, title: `highest token of ${name}` }, make("span", {}, name), make("b", {}, signed(z, 1))))),
    make("span", { class: "count" }, one.alerts ? make("span", { class: "flagged" }, icon("flag"), count(one.alerts, "alert")) : ""));
  }

  function tell() {
    if (!chosen.size) return bar.replaceChildren();
    bar.replaceChildren(icon("columns"), make("span", {}, chosen.size === 1 ? "One chosen: choose another to compare" : "Two chosen"), make("div", { class: "spring" }), unselect, chosen.size === 2 ? together : "");
  }

  return {
    show(params) {
      const wished = [...form.elements].filter((each) => each.name);
      wished.forEach((each) => { each.value = params.get(each.name) ?? ""; });
      clear.hidden = wished.every((each) => each.value === "");
      if (wished.some((each) => each.name !== "q" && each.value)) unfold.setAttribute("aria-expanded", form.classList.toggle("all", true));
      if (params.get("with")) {
        chosen.set(params.get("with"), { id: params.get("with") });
        tell();
      }
      load(true); // also when nothing was changed: conversations may have come since
    },
  };
}

export const steering = (plainSteering) => typeof plainSteering === "string" ? plainSteering
  : Object.entries(plainSteering.used ?? plainSteering).map(([name, strength]) => `${name} ${typeof strength === "number" ? signed(strength, 3) : strength}`).join(", ");

// ── one ──

/** The stored text of the first words that a user says, which is what a conversation is called. */
function titled(conversation) {
  const first = conversation.turns()[0];
  return first ? conversation.tokens.slice(first.start, first.end).join("").trim().slice(0, 120) : "";
}

async function single(host, id) {
  let view = null;
  await filled(host, async () => {
    const trace = await get(`/v1/traces/${encodeURIComponent(id)}`);
    const conversation = Conversation.read(trace);
    const scroller = make("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Conversation" });
    const reader = new Reader({ scroller, label: "Stored conversation" });
    const parts = [make("a", { class: "backlink", href: "#/history" }, icon("back"), make("span", {}, "History")),
      make("header", { class: "pagehead" }, make("h1", { tabindex: -1, dir: "auto" }, titled(conversation) || id),
        make("a", { class: "button", href: query("#/history", { with: id }) }, icon("columns"), make("span", {}, "Compare with…")),
        hasKey() ? button("Page", () => download(`/v1/traces/${encodeURIComponent(id)}/page`, `${id}.html`).catch(complain), { sign: "page", title: "One self-contained file that needs no network" })
          : make("a", { class: "button", href: `/v1/traces/${encodeURIComponent(id)}/page`, target: "_blank", rel: "noopener", title: "One self-contained file that needs no network" }, icon("page"), make("span", {}, "Page")),
        button("JSON", () => download(`/v1/traces/${encodeURIComponent(id)}`, `${id}.json`).catch(complain), { sign: "save" })),
      make("div", { class: "board" }, reader.bar, scroller),
      make("div", { class: "side" }, reader.timelinePanel, make("div", { class: "two" }, reader.planePanel, reader.topPanel), alertPanel(conversation, reader), facts(trace))];
    reader.show(conversation);
    view = { at: (token) => { if (token !== null) requestAnimationFrame(() => { const i = conversation.find(Number(token)); if (i >= 0) { reader.transcript.reveal(i); reader.held = i; reader.refresh(); } }); } };
    return make("div", { class: "reading" }, parts);
  });
  return view;
}

const complain = (error) => toast(error.message, { kind: "bad" });

function alertPanel(conversation, reader) {
  const list = conversation.alerts.map((alert) => make("li", {}, make("button", { type: "button", class: "firedrow", onclick: () => reader.transcript.reveal(conversation.find(alert.token)) },
    icon("flag"), make("b", {}, alert.rule), make("span", { class: "quote" }, `…${alert.words.slice(-80)}`), make("span", { class: "quiet" }, `token ${alert.token}`))));
  return list.length ? make("section", { class: "panel", "aria-label": "Alerts" }, make("header", {}, make("h2", {}, "Alerts"), make("span", { class: "quiet" }, count(list.length, "alarm"))), make("ul", { class: "fired" }, list)) : "";
}

/** How the reply was made: what was asked, of which model, how long it took. */
function facts(trace) {
  const rows = [];
  const add = (name, value) => { if (value !== undefined && value !== null && value !== "") rows.push([name, value]); };
  const sampling = trace.request?.sampling ?? {};
  const model = typeof trace.model === "string" ? { id: trace.model } : trace.model ?? {};
  add("id", trace.id);
  add("created", trace.created && time(trace.created));
  add("model", [model.id, model.dtype, model.device].filter(Boolean).join(", "));
  add("ended", SAID[trace.finish] ?? trace.finish);
  add("steering", trace.steering || "none");
  add("tokens", trace.usage && `${trace.usage.prompt_tokens} asked, ${trace.usage.completion_tokens} answered`);
  add("sampling", Object.entries(sampling).filter(([, value]) => value !== null && typeof value !== "object").map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", "));
  add("first token", trace.timing?.first_token !== undefined && `after ${plain(trace.timing.first_token, 2)} s`);
  add("whole reply", trace.timing?.total !== undefined && `${plain(trace.timing.total, 1)} s, ${plain(trace.timing.queued, 2)} s of them in the queue`);
  add("in one batch", trace.company !== undefined && (trace.company > 1 ? `with up to ${trace.company - 1} others` : "alone"));
  add("API key", trace.key);
  add("read at", `layer ${trace.layer}, ${trace.unit}`);
  return make("section", { class: "panel", "aria-label": "How it was made" }, make("header", {}, make("h2", {}, "How it was made")),
    make("dl", { class: "factlist" }, rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
}

// ── two ──

async function comparison(host, first, second) {
  let view = null;
  await filled(host, async () => {
    const traces = await Promise.all([first, second].map((id) => get(`/v1/traces/${encodeURIComponent(id)}`)));
    const sides = traces.map((trace, n) => {
      const conversation = Conversation.read(trace);
      const scroller = make("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": `${n ? "Second" : "First"} conversation` });
      const reader = new Reader({ scroller, compact: true, height: 150, label: n ? "Second" : "First" });
      return { trace, conversation, scroller, reader, name: n ? "B" : "A" };
    });
    const [a, b] = sides;
    a.reader.onview = (change) => b.reader.set(change, false);
    const differences = make("section", { class: "panel", "aria-label": "Largest differences" });
    sides.forEach(({ reader, conversation }) => reader.show(conversation));
    b.reader.set({ names: a.reader.names, name: a.reader.view.name }, false);
    a.reader.timeline.peer = b.reader.timeline;
    b.reader.timeline.peer = a.reader.timeline;
    fillDifferences(differences, a, b, (name) => a.reader.watch(name));
    view = { at() {} };
    return make("div", { class: "versus" }, make("a", { class: "backlink", href: "#/history" }, icon("back"), make("span", {}, "History")),
      make("header", { class: "pagehead" }, make("h1", { tabindex: -1 }, "Side by side")), a.reader.bar,
      make("div", { class: "sides" }, sides.map(({ trace, conversation, scroller, reader, name }) => make("article", { class: "half" },
        make("header", {}, make("span", { class: "letter" }, name), make("div", {}, make("h2", { dir: "auto" }, make("a", { href: path(trace.id) }, titled(conversation) || trace.id)),
          make("span", { class: "facts" }, time(trace.created), make("span", {}, count(conversation.spoken.length, "token")), make("span", {}, trace.steering ? `steered: ${trace.steering}` : "not steered"),
            trace.alerts?.length ? make("span", { class: "flagged" }, icon("flag"), count(trace.alerts.length, "alert")) : ""))),
        reader.timelinePanel, scroller))), differences);
  });
  return view;
}

/** In which emotions the two replies differ most: means over what the assistant says. */
function fillDifferences(host, a, b, onpick) {
  const mean = ({ conversation }, name) => {
    const own = conversation.turns().filter(({ role }) => role === "assistant" || role === "text").map(({ start, end }) => conversation.summary("inner", name, start, end)).filter(Boolean);
    const n = own.reduce((sum, one) => sum + one.n, 0);
    return n ? own.reduce((sum, one) => sum + one.n * one.mean, 0) / n : NaN;
  };
  const rows = a.conversation.names().map((name) => [name, mean(a, name), mean(b, name)]).filter(([, x, y]) => !Number.isNaN(x - y))
    .sort((one, two) => Math.abs(two[2] - two[1]) - Math.abs(one[2] - one[1])).slice(0, 12);
  const far = Math.max(1, ...rows.flatMap(([, x, y]) => [Math.abs(x), Math.abs(y)]));
  host.replaceChildren(make("header", {}, make("h2", {}, "Largest differences"), make("span", { class: "quiet" }, "mean over the replies, z; A hollow, B full")),
    rows.length ? make("ol", { class: "differences" }, rows.map(([name, x, y]) => make("li", { vars: { "--a": String(x / far), "--b": String(y / far) } },
      make("button", { type: "button", class: "link", onclick: () => onpick(name) }, name), make("span", { class: "dumbbell" }, make("i", { class: "line" }), make("i", { class: "dot a" }), make("i", { class: "dot b" })),
      make("span", { class: "number" }, signed(x, 1)), make("span", { class: "number" }, signed(y, 1)), make("b", { class: "number" }, signed(y - x, 1))))) : make("p", { class: "quiet" }, "Nothing was read in both."));
}
