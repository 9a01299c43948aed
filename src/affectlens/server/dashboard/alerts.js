// Alerts: what fired and in which passage, acknowledged with a note; the rules are in rules.js.

import { make, button, icon, tabs, signed, time, blank, filled, count, toast, announce, passage } from "./dom.js";
import { get, post, query } from "./api.js";
import { catalog, onCatalog } from "./catalog.js";
import { onTraffic } from "./traffic.js";
import { rulesIn, mutes, expectation } from "./rules.js";

const PAGE = 50;

export function alerts() {
  const inbox = make("div", { class: "inbox" });
  const rules = make("div", { class: "rules" });
  const set = tabs(
    "Alerts",
    [
      ["inbox", "Inbox", inbox],
      ["rules", "Rules", rules],
    ],
    (id) => {
      const next = id === "inbox" ? "#/alerts" : `#/alerts/${id}`;
      if (document.body.dataset.page === "alerts" && location.hash.split("?")[0] !== next)
        window.history.replaceState(null, "", next);
      if (id === "inbox") box.load();
    },
  );
  const node = make(
    "section",
    { class: "page alerts" },
    make("header", { class: "pagehead" }, make("h1", { tabindex: -1 }, "Alerts"), set.node),
    inbox,
    rules,
  );
  const box = inboxIn(inbox);
  rulesIn(rules);
  return {
    node,
    show([part]) {
      set.show(part === "rules" ? "rules" : "inbox");
    },
  };
}

// ── the inbox ──

function inboxIn(host) {
  const state = make(
    "select",
    { class: "field", name: "state", "aria-label": "State", onchange: () => load() },
    make("option", { value: "open" }, "open"),
    make("option", { value: "acknowledged" }, "acknowledged"),
    make("option", { value: "" }, "all"),
  );
  const rule = make("select", { class: "field", name: "rule", "aria-label": "Rule of the alerts", onchange: () => load() });
  onCatalog(() => {
    const had = rule.value;
    rule.replaceChildren(
      make("option", { value: "" }, "every rule"),
      ...catalog.rules.map((one) => make("option", { value: one.name }, one.name)),
    );
    rule.value = had;
  });
  const place = make("div");
  const list = make("ol", { class: "cards" });
  const more = button("Show more", () => load(false));
  more.hidden = true;
  const fresh = make("div", { class: "fresh" });
  host.append(
    make(
      "form",
      { class: "filters" },
      make("label", { class: "labelled" }, make("span", {}, "State"), state),
      make("label", { class: "labelled" }, make("span", {}, "Rule"), rule),
    ),
    fresh,
    place,
    make("div", { class: "centre" }, more),
  );

  let next = null,
    wanted = 0;
  async function load(anew = true) {
    const turn = ++wanted; // answers may come in another order than they were asked for: only the last one counts
    const ask = () => get(query("/v1/alerts", { state: state.value, rule: rule.value, limit: PAGE, after: anew ? null : next }));
    if (!anew) {
      const page = await ask().catch((error) => toast(error.message, { kind: "bad" }));
      if (page && turn === wanted) {
        list.append(...page.data.map(card));
        next = page.next;
        more.hidden = !next;
      }
      return;
    }
    more.hidden = true; // it would ask for more of the list that goes
    fresh.replaceChildren();
    await filled(place, async () => {
      const page = await ask();
      if (turn !== wanted) throw Object.assign(new Error(), { name: "AbortError" });
      next = page.next;
      more.hidden = !next;
      if (!page.data.length) return nothing();
      list.replaceChildren(...page.data.map(card));
      return list;
    });
  }

  const nothing = () =>
    state.value === "open" && !rule.value
      ? blank(
          "No open alert",
          catalog.rules.some((one) => one.armed)
            ? "Rules are armed; what they find will stand here."
            : "No rule is armed, so nothing can fire.",
          make("a", { class: "button", href: "#/alerts/rules" }, "Look at the rules"),
        )
      : blank(
          "No alert matches",
          "Other filters find more.",
          button("Show all", () => {
            state.value = "";
            rule.value = "";
            load();
          }),
        );

  let waiting = 0;
  onTraffic((event) => {
    if (event !== "alert" || host.hidden || state.value === "acknowledged") return;
    waiting += 1;
    fresh.replaceChildren(
      button(
        `${count(waiting, "new alert")}: show`,
        () => {
          waiting = 0;
          load();
        },
        { sign: "flag", kind: "small" },
      ),
    );
  });

  function card(alert) {
    const note = make("textarea", { class: "field", rows: 2, placeholder: "What was done about it", "aria-label": "Note" });
    const write = make(
      "form",
      {
        class: "acknowledge",
        onsubmit: (event) => {
          event.preventDefault();
          done();
        },
      },
      note,
      make(
        "div",
        { class: "row" },
        make("button", { type: "submit", class: "button main small" }, icon("check"), make("span", {}, "Acknowledge")),
        button(
          "Cancel",
          () => {
            write.hidden = true;
            begin.focus();
          },
          { kind: "ghost small" },
        ),
      ),
    );
    write.hidden = true;
    note.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        write.hidden = true;
        begin.focus();
      }
    });
    const begin = button(
      "Acknowledge",
      () => {
        write.hidden = false;
        note.focus();
      },
      { sign: "check", kind: "small" },
    );
    const own = catalog.rules.find((one) => one.name === alert.rule);
    const actions = make(
      "div",
      { class: "row" },
      alert.state === "acknowledged" ? make("span", { class: "pill ok" }, icon("check"), "acknowledged") : begin,
      own && mutes(own),
      make(
        "a",
        { class: "button ghost small", href: `#/history/${encodeURIComponent(alert.trace)}?token=${alert.token}` },
        "Open at the token",
      ),
    );
    const node = make(
      "li",
      { class: `card${alert.state === "acknowledged" ? " over" : ""}` },
      make(
        "header",
        {},
        icon("flag"),
        make("h3", {}, alert.rule),
        alert.rule === alert.text ? null : make("code", {}, alert.text),
        make("div", { class: "spring" }),
        time(alert.created),
      ),
      make("blockquote", { dir: "auto" }, passage(alert.words)),
      make(
        "p",
        { class: "facts" },
        Object.entries(alert.scores ?? {}).map(([name, z]) => make("span", {}, `${name} `, make("b", {}, signed(z)))),
        make("span", {}, `${alert.speaker}, turn ${alert.turn + 1}, token ${alert.token}`),
        alert.expected && make("span", {}, `expected ${expectation(alert.expected)} per 1,000 replies`),
      ),
      alert.note ? make("p", { class: "notetext" }, alert.note) : null,
      actions,
      write,
    );
    async function done() {
      try {
        await post(`/v1/alerts/${encodeURIComponent(alert.id)}/acknowledge`, { note: note.value });
      } catch (error) {
        toast(error.message, { kind: "bad" });
        return;
      }
      announce("Acknowledged");
      dispatchEvent(new Event("affectlens-alerts"));
      const after = node.nextElementSibling ?? node.previousElementSibling;
      if (state.value === "open") node.remove();
      else node.replaceWith(card({ ...alert, state: "acknowledged", note: note.value }));
      (after?.querySelector("button, a") ?? state).focus();
      if (!list.children.length) load();
    }
    return node;
  }
  return { load };
}
