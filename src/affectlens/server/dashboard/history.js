// History: find stored conversations and take them away as files; one or two of them are opened in stored.js.

import { make, button, icon, count, signed, time, blank, filled, menu, settled, toast } from "./dom.js";
import { get, query, download } from "./api.js";
import { catalog, onCatalog } from "./catalog.js";
import { single, comparison, path } from "./stored.js";
import { level } from "./transcript.js";

const PAGE = 50;

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
      opened.get(key).then(
        (view) => view?.at(params.get("token")),
        () => {},
      );
    },
  };
}

// ── the list ──

function searching(host) {
  const chosen = new Map(); // those that are to be compared
  const form = make("form", {
    class: "filters",
    role: "search",
    onsubmit: (event) => {
      event.preventDefault();
      apply();
    },
    onchange: () => apply(),
  });
  const input = (name, label, type, kind, more = {}) =>
    make("label", { class: `labelled ${kind}` }, make("span", {}, label), make("input", { class: "field", type, name, ...more }));
  const words = input("q", "Words", "search", "grow", { placeholder: "in prompt or reply" });
  const emotion = make("select", { class: "field", name: "emotion", "aria-label": "Emotion" });
  const alert = make("select", { class: "field", name: "alert", "aria-label": "Alert" });
  const above = make("input", {
    class: "field",
    type: "number",
    name: "above",
    step: "0.5",
    placeholder: "any",
    "aria-label": "Peak above, in z",
  });
  const clear = button(
    "Clear",
    () => {
      form.reset();
      apply();
    },
    { kind: "ghost" },
  );
  const unfold = button("Filters", () => unfold.setAttribute("aria-expanded", form.classList.toggle("all")), {
    kind: "unfold",
    "aria-expanded": "false",
  }); // on a phone
  form.append(
    words,
    unfold,
    make("label", { class: "labelled fold" }, make("span", {}, "Emotion"), emotion),
    make("label", { class: "labelled short fold" }, make("span", {}, "Peak above"), above),
    make("label", { class: "labelled fold" }, make("span", {}, "Alert"), alert),
    input("since", "Since", "datetime-local", "when fold"),
    input("until", "Until", "datetime-local", "when fold"),
    make("button", { class: "hidden", type: "submit", tabindex: -1 }, "Search"),
    clear,
  );
  words.addEventListener(
    "input",
    settled(() => apply(), 350),
  );
  onCatalog(() => {
    const [was, had] = [emotion.value, alert.value];
    emotion.replaceChildren(
      make("option", { value: "" }, "any"),
      ...catalog.names.map((name) => make("option", { value: name }, name)),
    );
    alert.replaceChildren(
      make("option", { value: "" }, "with or without"),
      make("option", { value: "any" }, "any alert"),
      ...catalog.rules.map((rule) => make("option", { value: rule.name }, rule.name)),
    );
    [emotion.value, alert.value] = [was, had];
  });

  const results = make("ol", { class: "results", "aria-label": "Conversations" });
  const place = make("div", {}, results);
  const more = button("Show more", () => load(false));
  more.hidden = true;
  const together = button(
    "Compare",
    () => {
      location.hash = `${path([...chosen.keys()][0])}/${encodeURIComponent([...chosen.keys()][1])}`;
    },
    { sign: "columns", kind: "main" },
  );
  const unselect = button(
    "Clear selection",
    () => {
      chosen.clear();
      host.querySelectorAll(".results input").forEach((box) => {
        box.checked = false;
      });
      tell();
    },
    { kind: "ghost small" },
  );
  const bar = make("div", { class: "selection", role: "status" });
  const files = menu("Export", "save", "", [
    ["All as JSONL", () => save("jsonl", "affectlens-traces.jsonl")],
    ["For Langfuse, JSONL", () => save("langfuse", "affectlens-langfuse.jsonl")],
  ]);
  host.append(
    make("header", { class: "pagehead" }, make("h1", { tabindex: -1 }, "History"), make("div", { class: "spring" }), files),
    form,
    bar,
    place,
    make("div", { class: "centre" }, more),
  );

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

  let next = null,
    wanted = 0;
  async function load(anew) {
    const turn = ++wanted;
    if (anew) {
      more.hidden = true;
      await filled(
        place,
        async () => {
          const page = await get(query("/v1/traces", { ...values(), limit: PAGE }));
          if (turn !== wanted) throw Object.assign(new Error(), { name: "AbortError" });
          next = page.next;
          more.hidden = !next;
          if (!page.data.length) return nothing();
          results.replaceChildren(...page.data.map(row));
          return results;
        },
        { rows: 8 },
      );
      return;
    }
    more.disabled = true;
    try {
      const page = await get(query("/v1/traces", { ...values(), limit: PAGE, after: next }));
      if (turn === wanted) {
        const rows = page.data.map(row);
        results.append(...rows);
        rows[0]?.querySelector("a").focus();
        next = page.next;
        more.hidden = !next;
      }
    } catch (error) {
      toast(error.message, { kind: "bad" });
    }
    more.disabled = false;
  }

  const nothing = () =>
    Object.values(values()).some(Boolean)
      ? blank(
          "No conversation matches",
          "Fewer filters find more; peaks are those of the highest token.",
          button("Clear the filters", () => {
            form.reset();
            apply();
          }),
        )
      : blank(
          "Nothing is stored yet",
          "Every reply of this server is kept here with its readings. Say something on the live page, or point an OpenAI client at this address.",
          make("a", { class: "button main", href: "#/live" }, "Go to Live"),
        );

  function row(one) {
    const box = make("input", {
      type: "checkbox",
      "aria-label": `Compare ${one.title || one.id}`,
      onchange: () => {
        if (box.checked) chosen.set(one.id, one);
        else chosen.delete(one.id);
        if (chosen.size > 2) {
          const oldest = [...chosen.keys()][0];
          chosen.delete(oldest);
          const old = results.querySelector(`[data-id="${CSS.escape(oldest)}"] input`);
          if (old) old.checked = false;
        }
        tell();
      },
    });
    box.checked = chosen.has(one.id);
    const peaks = Object.entries(one.peaks ?? {}).slice(0, 4);
    return make(
      "li",
      { data: { id: one.id } },
      make("label", { class: "tick" }, box),
      make(
        "a",
        { class: "what", href: path(one.id) },
        make("b", { dir: "auto" }, one.title || "(text is not kept)"),
        make(
          "span",
          { class: "facts" },
          time(one.created),
          make("span", {}, one.kind),
          make("span", {}, one.model),
          make("span", {}, count(one.tokens, "token")),
          one.finish === "stopped" && make("span", { class: "warn" }, "stopped by a rule"),
          one.steering && Object.keys(one.steering).length ? make("span", {}, `steered: ${steering(one.steering)}`) : null,
        ),
      ),
      make(
        "span",
        { class: "reads" },
        (one.top ?? []).slice(0, 3).map((entry) => make("span", {}, [entry].flat()[0])),
      ),
      make(
        "span",
        { class: "peaks" },
        peaks.map(([name, z]) =>
          make(
            "span",
            { class: `peak ${level(z, 6)}`, title: `highest token of ${name}` },
            make("span", {}, name),
            make("b", {}, signed(z, 1)),
          ),
        ),
      ),
      make(
        "span",
        { class: "count" },
        one.alerts ? make("span", { class: "flagged" }, icon("flag"), count(one.alerts, "alert")) : "",
      ),
    );
  }

  function tell() {
    if (!chosen.size) return bar.replaceChildren();
    bar.replaceChildren(
      icon("columns"),
      make("span", {}, chosen.size === 1 ? "One chosen: choose another to compare" : "Two chosen"),
      make("div", { class: "spring" }),
      unselect,
      chosen.size === 2 ? together : "",
    );
  }

  return {
    show(params) {
      const wished = [...form.elements].filter((each) => each.name);
      wished.forEach((each) => {
        each.value = params.get(each.name) ?? "";
      });
      clear.hidden = wished.every((each) => each.value === "");
      if (wished.some((each) => each.name !== "q" && each.value))
        unfold.setAttribute("aria-expanded", form.classList.toggle("all", true));
      if (params.get("with")) {
        chosen.set(params.get("with"), { id: params.get("with") });
        tell();
      }
      load(true); // also when nothing was changed: conversations may have come since
    },
  };
}

const steering = (plainSteering) =>
  typeof plainSteering === "string"
    ? plainSteering
    : Object.entries(plainSteering.used ?? plainSteering)
        .map(([name, strength]) => `${name} ${typeof strength === "number" ? signed(strength, 3) : strength}`)
        .join(", ");
