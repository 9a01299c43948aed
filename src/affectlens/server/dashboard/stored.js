// A stored conversation with everything the live view shows, and two of them side by side.

import { make, button, icon, count, signed, plain, time, blank, filled, toast } from "./dom.js";
import { get, query, download, hasKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { Reader } from "./reader.js";
import { traffic, onTraffic } from "./traffic.js";

export const path = (id) => `#/history/${encodeURIComponent(id)}`;
const SAID = {
  stop: "finished",
  length: "reached its longest length",
  stopped: "stopped by a rule",
  timeout: "ended by the time limit",
  shutdown: "ended because the server shut down",
  read: "only read",
};

/** Readers are made once and shown again, so that what is kept does not grow with what was opened. */
const readers = new Map();
function readerAt(place, label, options = {}) {
  if (!readers.has(place)) {
    const scroller = make("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": label });
    readers.set(place, { scroller, reader: new Reader({ scroller, label: place, ...options }) });
  }
  return readers.get(place);
}

/** What is shown of a reply that has not ended: it is stored when it has. */
let awaited = null;
onTraffic((event, reply, data) => {
  if (event !== "done" || awaited?.id !== data.trace) return;
  const { again } = awaited;
  awaited = null;
  again();
});

// ── one ──

/** The stored text of the first words that a user says, which is what a conversation is called. */
function titled(conversation) {
  const first = conversation.turns()[0];
  return first ? conversation.tokens.slice(first.start, first.end).join("").trim().slice(0, 120) : "";
}

/** One conversation in a place; gives what can go to one of its tokens. */
export async function single(host, id) {
  let view = null;
  const again = () => filled(host, load);
  const load = async () => {
    awaited = null;
    let trace;
    try {
      trace = await get(`/v1/traces/${encodeURIComponent(id)}`);
    } catch (error) {
      const reply = traffic.replies.get(id);
      if (error.status !== 404 || !reply || reply.ended) throw error;
      awaited = { id, again: () => location.hash.startsWith(path(id)) && again() };
      return blank(
        "This reply is still being generated",
        "It is stored when it has ended, and will be shown here then.",
        make("a", { class: "button main", href: query("#/live", { follow: id }) }, "Look on in Live"),
      );
    }
    const conversation = Conversation.read(trace);
    const { scroller, reader } = readerAt("Stored conversation", "Conversation");
    const parts = [
      make("a", { class: "backlink", href: "#/history" }, icon("back"), make("span", {}, "History")),
      make(
        "header",
        { class: "pagehead" },
        make("h1", { tabindex: -1, dir: "auto" }, titled(conversation) || id),
        make(
          "a",
          { class: "button", href: query("#/history", { with: id }) },
          icon("columns"),
          make("span", {}, "Compare with…"),
        ),
        hasKey()
          ? button("Page", () => download(`/v1/traces/${encodeURIComponent(id)}/page`, `${id}.html`).catch(complain), {
              sign: "page",
              title: "One self-contained file that needs no network",
            })
          : make(
              "a",
              {
                class: "button",
                href: `/v1/traces/${encodeURIComponent(id)}/page`,
                target: "_blank",
                rel: "noopener",
                title: "One self-contained file that needs no network",
              },
              icon("page"),
              make("span", {}, "Page"),
            ),
        button("JSON", () => download(`/v1/traces/${encodeURIComponent(id)}`, `${id}.json`).catch(complain), { sign: "save" }),
      ),
      make("div", { class: "board" }, reader.bar, scroller),
      make(
        "div",
        { class: "side" },
        reader.timelinePanel,
        make("div", { class: "two" }, reader.planePanel, reader.topPanel),
        alertPanel(conversation, reader),
        facts(trace),
      ),
    ];
    reader.show(conversation);
    view = {
      at: (token) => {
        if (token !== null)
          requestAnimationFrame(() => {
            const i = conversation.find(Number(token));
            if (i >= 0) {
              reader.transcript.reveal(i);
              reader.held = i;
              reader.refresh();
            }
          });
      },
    };
    return make("div", { class: "reading" }, parts);
  };
  await again();
  return { at: (token) => view?.at(token) };
}

const complain = (error) => toast(error.message, { kind: "bad" });

function alertPanel(conversation, reader) {
  const list = conversation.alerts.map((alert) =>
    make(
      "li",
      {},
      make(
        "button",
        { type: "button", class: "firedrow", onclick: () => reader.transcript.reveal(conversation.find(alert.token)) },
        icon("flag"),
        make("b", {}, alert.rule),
        make("span", { class: "quote" }, `…${alert.words.slice(-80)}`),
        make("span", { class: "quiet" }, `token ${alert.token}`),
      ),
    ),
  );
  return list.length
    ? make(
        "section",
        { class: "panel", "aria-label": "Alerts" },
        make("header", {}, make("h2", {}, "Alerts"), make("span", { class: "quiet" }, count(list.length, "alarm"))),
        make("ul", { class: "fired" }, list),
      )
    : "";
}

/** How the reply was made: what was asked, of which model, how long it took. */
function facts(trace) {
  const rows = [];
  const add = (name, value) => {
    if (value !== undefined && value !== null && value !== "") rows.push([name, value]);
  };
  const sampling = trace.request?.sampling ?? {};
  const model = typeof trace.model === "string" ? { id: trace.model } : (trace.model ?? {});
  add("id", trace.id);
  add("created", trace.created && time(trace.created));
  add("model", [model.id, model.dtype, model.device].filter(Boolean).join(", "));
  add("ended", SAID[trace.finish] ?? trace.finish);
  add("steering", trace.steering || "none");
  add("tokens", trace.usage && `${trace.usage.prompt_tokens} asked, ${trace.usage.completion_tokens} answered`);
  add(
    "sampling",
    Object.entries(sampling)
      .filter(([, value]) => value !== null && typeof value !== "object")
      .map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`)
      .join(", "),
  );
  add("first token", trace.timing?.first_token !== undefined && `after ${plain(trace.timing.first_token, 2)} s`);
  add(
    "whole reply",
    trace.timing?.total !== undefined &&
      `${plain(trace.timing.total, 1)} s, ${plain(trace.timing.queued, 2)} s of them in the queue`,
  );
  add("in one batch", trace.company !== undefined && (trace.company > 1 ? `with up to ${trace.company - 1} others` : "alone"));
  add("API key", trace.key);
  add("read at", `layer ${trace.layer}, ${trace.unit}`);
  return make(
    "section",
    { class: "panel", "aria-label": "How it was made" },
    make("header", {}, make("h2", {}, "How it was made")),
    make(
      "dl",
      { class: "factlist" },
      rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    ),
  );
}

// ── two ──

/** Two conversations side by side. */
export async function comparison(host, first, second) {
  let view = null;
  await filled(host, async () => {
    const traces = await Promise.all([first, second].map((id) => get(`/v1/traces/${encodeURIComponent(id)}`)));
    const sides = traces.map((trace, n) => {
      const conversation = Conversation.read(trace);
      const name = n ? "B" : "A";
      const { scroller, reader } = readerAt(name, `Conversation ${name}`, { compact: true, height: 150 });
      return { trace, conversation, scroller, reader, name };
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
    return make(
      "div",
      { class: "versus" },
      make("a", { class: "backlink", href: "#/history" }, icon("back"), make("span", {}, "History")),
      make("header", { class: "pagehead" }, make("h1", { tabindex: -1 }, "Side by side")),
      a.reader.bar,
      make(
        "div",
        { class: "sides" },
        sides.map(({ trace, conversation, scroller, reader, name }) =>
          make(
            "article",
            { class: "half" },
            make(
              "header",
              {},
              make("span", { class: "letter" }, name),
              make(
                "div",
                {},
                make("h2", { dir: "auto" }, make("a", { href: path(trace.id) }, titled(conversation) || trace.id)),
                make(
                  "span",
                  { class: "facts" },
                  time(trace.created),
                  make("span", {}, count(conversation.spoken.length, "token")),
                  make("span", {}, trace.steering ? `steered: ${trace.steering}` : "not steered"),
                  trace.alerts?.length
                    ? make("span", { class: "flagged" }, icon("flag"), count(trace.alerts.length, "alert"))
                    : "",
                ),
              ),
            ),
            reader.timelinePanel,
            scroller,
          ),
        ),
      ),
      differences,
    );
  });
  return view;
}

/** In which emotions the two replies differ most: means over what the assistant says. */
function fillDifferences(host, a, b, onpick) {
  const mean = ({ conversation }, name) => {
    const own = conversation
      .turns()
      .filter(({ role }) => role === "assistant" || role === "text")
      .map(({ start, end }) => conversation.summary("inner", name, start, end))
      .filter(Boolean);
    const n = own.reduce((sum, one) => sum + one.n, 0);
    return n ? own.reduce((sum, one) => sum + one.n * one.mean, 0) / n : NaN;
  };
  const rows = a.conversation
    .names()
    .map((name) => [name, mean(a, name), mean(b, name)])
    .filter(([, x, y]) => !Number.isNaN(x - y))
    .sort((one, two) => Math.abs(two[2] - two[1]) - Math.abs(one[2] - one[1]))
    .slice(0, 12);
  const far = Math.max(1, ...rows.flatMap(([, x, y]) => [Math.abs(x), Math.abs(y)]));
  host.replaceChildren(
    make(
      "header",
      {},
      make("h2", {}, "Largest differences"),
      make("span", { class: "quiet" }, "mean over the replies, z; A hollow, B full"),
    ),
    rows.length
      ? make(
          "ol",
          { class: "differences" },
          rows.map(([name, x, y]) =>
            make(
              "li",
              { vars: { "--a": String(x / far), "--b": String(y / far) } },
              make("button", { type: "button", class: "link", onclick: () => onpick(name) }, name),
              make(
                "span",
                { class: "dumbbell" },
                make("i", { class: "line" }),
                make("i", { class: "dot a" }),
                make("i", { class: "dot b" }),
              ),
              make("span", { class: "number" }, signed(x, 1)),
              make("span", { class: "number" }, signed(y, 1)),
              make("b", { class: "number" }, signed(y - x, 1)),
            ),
          ),
        )
      : make("p", { class: "quiet" }, "Nothing was read in both."),
  );
}
