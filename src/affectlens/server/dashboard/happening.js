// What else happens on the server: the alerts since the page was opened, and the replies that are being generated for others.

import { make, icon, time, signed, count, throttled } from "./dom.js";
import { traffic, onTraffic } from "./traffic.js";

const LATELY = 120000; // milliseconds that a reply which has ended is still offered

/**
 * Two panels. `own(trace)` says whether a reply is the page's own, `followed()` gives the one that is looked at, `shown()` the
 * emotion in front; `onfollow(reply)` is called when one is chosen.
 */
export function happening({ own, followed, shown, onfollow }) {
  const flights = make("ul", { class: "flights" });
  const list = throttled(() => {
    const replies = [...traffic.replies.values()]
      .filter((reply) => !own(reply.trace) && (!reply.ended || Date.now() - reply.since < LATELY))
      .slice(-5)
      .reverse();
    if (!replies.length) {
      flights.replaceChildren(make("li", { class: "quiet none" }, "No other reply is being generated."));
      return;
    }
    const focused = document.activeElement?.dataset.trace;
    flights.replaceChildren(
      ...replies.map((reply) => {
        const name = shown(),
          found = reply.conversation.summary("inner", name, 0, reply.conversation.length);
        return make(
          "li",
          {},
          make(
            "button",
            {
              type: "button",
              class: "flight",
              data: { trace: reply.trace },
              "aria-current": followed() === reply ? "true" : null,
              onclick: () => onfollow(reply),
            },
            make("i", { class: reply.ended ? "over" : "on" }),
            make("b", {}, reply.key || "no key"),
            make("span", { class: "quiet" }, count(reply.conversation.length, "token")),
            make("span", { class: "number" }, found ? `${name} ${signed(found.mean, 1)}` : ""),
          ),
        );
      }),
    );
    if (focused) flights.querySelector(`[data-trace="${CSS.escape(focused)}"]`)?.focus();
  }, 400);
  list();

  const none = make("li", { class: "quiet none" }, "No rule has fired since this page was opened.");
  const fired = make("ul", { class: "fired" }, none);
  onTraffic((event, reply, alert) => {
    if (event === "alert") {
      none.remove();
      fired.prepend(
        make(
          "li",
          {},
          make(
            "a",
            { href: `#/history/${encodeURIComponent(alert.trace)}?token=${alert.token}` },
            icon("flag"),
            make("b", {}, alert.rule),
            make("span", { class: "quote" }, alert.words ?? ""),
            make("span", { class: "quiet" }, time(new Date().toISOString())),
          ),
        ),
      );
      while (fired.children.length > 6) fired.lastChild.remove();
    }
    list();
  });
  return [
    make(
      "section",
      { class: "panel", "aria-label": "Alerts of this session" },
      make("header", {}, make("h2", {}, "Alerts"), make("div", { class: "spring" }), make("a", { href: "#/alerts" }, "Inbox")),
      fired,
    ),
    make(
      "section",
      { class: "panel", "aria-label": "Other replies" },
      make("header", {}, make("h2", {}, "In flight"), make("span", { class: "quiet" }, "replies for anybody on this server")),
      flights,
    ),
  ];
}
