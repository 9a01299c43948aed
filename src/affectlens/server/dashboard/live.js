// Live: talk with the model, see what is read at each token as it comes, steer, compare, or look on at other replies.

import { make, button, icon, choice, signed, count, announce, blank, toast } from "./dom.js";
import { chunks, get, post } from "./api.js";
import { catalog, onCatalog } from "./catalog.js";
import { Conversation } from "./conversation.js";
import { Reader } from "./reader.js";
import { Dials } from "./dials.js";
import { traffic, onTraffic } from "./traffic.js";
import { happening } from "./happening.js";

const OPENINGS = [
  "The deadline is in seven minutes and nothing works. What do I do?",
  "Tell me about an afternoon when nothing had to be done.",
  "I think I have broken something that cannot be repaired.",
];

export function live() {
  let messages = [],
    beside = new Map(),
    conversation = new Conversation();
  let running = null; // AbortController of the reply that is being generated
  const own = new Set(); // traces that were asked for here
  let followed = null;

  // ── the words ──
  const scroller = make("div", { class: "scroller", tabindex: 0, role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const reader = new Reader({ scroller, label: "Live" });
  const dials = new Dials({
    onchange: () => {
      compare.disabled = !Object.keys(dials.mixture).length;
      compareLabel.classList.toggle("off", compare.disabled);
    },
  });

  const model = make("select", { class: "field", "aria-label": "Model" });
  const onlyModel = make("span", { class: "mono" });
  onCatalog(() => {
    model.replaceChildren(...catalog.models.map((id) => make("option", { value: id }, id)));
    model.hidden = catalog.models.length < 2;
    onlyModel.hidden = !model.hidden;
    onlyModel.textContent = catalog.models[0] ?? "";
  });

  const fresh = button(
    "New conversation",
    () => {
      stop();
      clear();
      words.focus();
    },
    { sign: "plus", kind: "ghost" },
  );
  const head = make(
    "header",
    { class: "pagehead" },
    make("h1", { tabindex: -1 }, "Live"),
    model,
    onlyModel,
    make("div", { class: "spring" }),
    fresh,
  );

  // ── what is asked ──
  const words = make("textarea", { class: "field", rows: 1, placeholder: "Say something to the model", "aria-label": "Message" });
  const fit = () => {
    words.style.height = "auto";
    words.style.height = `${Math.min(180, words.scrollHeight + 2)}px`;
  };
  words.addEventListener("input", fit);
  words.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
    if (event.key === "Escape" && running) {
      event.preventDefault();
      stop();
    }
  });
  const go = button("Send", () => send(), { sign: "send", words: false, kind: "main" });
  const halt = button("Stop", () => stop(), { sign: "stop", kind: "main" });
  halt.hidden = true;
  const compare = make("input", { type: "checkbox", disabled: true });
  const compareLabel = make(
    "label",
    { class: "check off", title: "Generate the reply once more without steering, and show both" },
    compare,
    make("span", {}, "Compare with the unsteered reply"),
  );
  const system = make("textarea", { class: "field", rows: 2, placeholder: "none" });
  const number = (value, step, min, max) => make("input", { class: "field", type: "number", value, step, min, max });
  const [temperature, longest, seed] = [number("0.8", 0.1, 0, 2), number("200", 10, 1, 8000), number("", 1, 0, 2 ** 31)];
  seed.placeholder = "any";
  const labelled = (text, field) => make("label", { class: "labelled" }, make("span", {}, text), field);
  const options = make(
    "details",
    { class: "options" },
    make("summary", {}, icon("dials"), "Options"),
    make(
      "div",
      {},
      labelled("System prompt", system),
      labelled("Temperature", temperature),
      labelled("Longest reply, tokens", longest),
      labelled("Seed", seed),
    ),
  );
  const read = button("Only read it", () => readOnly(), {
    sign: "page",
    kind: "ghost",
    title: "Read this text without asking for a reply",
  });
  const composer = make(
    "form",
    {
      class: "composer",
      onsubmit: (event) => {
        event.preventDefault();
        send();
      },
    },
    make("div", { class: "write" }, words, go, halt),
    make("div", { class: "asides" }, compareLabel, make("div", { class: "spring" }), read, options),
  );

  const status = make("div", { class: "turnstate", role: "status" });
  const following = make("div", { class: "following" });
  following.hidden = true;

  // ── the side ──
  const happens = happening({
    own: (trace) => own.has(trace),
    followed: () => followed,
    shown: () => reader.view.name,
    onfollow: followReply,
  });

  const side = make(
    "div",
    { class: "side" },
    reader.timelinePanel,
    make("div", { class: "two" }, reader.planePanel, reader.topPanel),
    dials.node,
    make("div", { class: "two" }, ...happens),
  );
  const talk = make("div", { class: "board" }, reader.bar, following, scroller, status, composer);
  const node = make("section", { class: "page live" }, head, talk, side);
  // On a phone there is room for one of the three.
  const narrow = choice(
    "Part of the page",
    [
      ["talk", "Talk"],
      ["readings", "Readings"],
      ["steer", "Steer"],
    ],
    "talk",
    (part) => {
      node.dataset.part = part;
    },
  );
  narrow.classList.add("parts");
  node.dataset.part = "talk";
  head.after(narrow);

  // ── what happens ──
  function clear() {
    messages = [];
    beside = new Map();
    conversation = new Conversation();
    unfollow(false);
    reader.show(conversation);
    status.replaceChildren();
    empty();
  }

  function empty() {
    scroller.querySelector(".blank")?.remove();
    if (conversation.length) return;
    scroller.append(
      blank(
        "Nothing has been said yet",
        "Every token of the reply will be coloured by what is read in the model as it comes: red above its baseline, blue below.",
        make(
          "div",
          { class: "openings" },
          OPENINGS.map((text) =>
            make(
              "button",
              {
                type: "button",
                class: "opening",
                onclick: () => {
                  words.value = text;
                  fit();
                  send();
                },
              },
              text,
            ),
          ),
        ),
      ),
    );
  }

  function busy(now) {
    running = now;
    go.hidden = Boolean(now);
    halt.hidden = !now;
    node.classList.toggle("running", Boolean(now));
    for (const one of [fresh, read]) one.disabled = Boolean(now);
  }

  function stop() {
    running?.abort();
  }

  const say = (...parts) => status.replaceChildren(...parts.flat().filter(Boolean));
  const problem = (error, again) =>
    say(
      make(
        "div",
        { class: "problem", role: "alert" },
        make("b", {}, error.title ?? "The reply failed"),
        make("span", {}, error.message),
        again &&
          button(error.retry ? `Try again in ${error.retry} s` : "Try again", again, {
            kind: "small",
            disabled: Boolean(error.retry),
          }),
      ),
    );

  async function send() {
    const text = words.value.trim();
    if (!text || running) return;
    words.value = "";
    options.open = false;
    fit();
    messages.push({ role: "user", content: text });
    await reply();
  }

  async function reply() {
    unfollow(false);
    const control = new AbortController();
    busy(control);
    // Until the first token comes, what was asked stands there without a reading.
    const waiting = new Conversation();
    Object.assign(waiting, { unit: conversation.unit });
    for (const message of messages) waiting.push({ text: message.content, role: message.role });
    if (conversation.length) conversation.push({ text: messages.at(-1).content, role: "user" });
    else conversation = waiting;
    reader.show(conversation, { beside, streaming: true });
    empty();
    reader.grow();
    say(make("span", { class: "dots" }, "Waiting for the first token"));

    const mixture = dials.mixture;
    const body = {
      model: model.value || catalog.models[0],
      messages: [...(system.value.trim() ? [{ role: "system", content: system.value.trim() }] : []), ...messages],
      stream: true,
      temperature: Number(temperature.value),
      max_tokens: Number(longest.value),
      ...(seed.value !== "" && { seed: Number(seed.value) }),
      readings: { emotions: "all", every: 1, prompt: true, visible: true },
      ...(Object.keys(mixture).length && { emotion_bias: mixture, ...(compare.checked && { compare: true }) }),
    };
    let started = null,
      took = 0,
      reply = "",
      finish = "",
      last = {},
      turn = -1,
      other = null,
      tokens = 0;
    const begin = (first) => {
      started = performance.now();
      if (first.prompt?.length) {
        conversation = new Conversation();
        first.prompt.forEach((token) => conversation.push(token));
        if (body.compare) {
          other = new Conversation();
          first.prompt.forEach((token) => other.push(token));
        }
      } else if (body.compare) {
        other = new Conversation();
        messages.forEach((message) => other.push({ text: message.content, role: message.role }));
      }
      Object.assign(conversation, { id: first.id, unit: first.unit ?? "z", layer: first.layer });
      turn = (conversation.turn[conversation.spoken.at(-1)] ?? -1) + 1;
      if (other) beside.set(turn, other);
      reader.show(conversation, { beside, streaming: true });
      reader.sticky = true;
    };
    try {
      for await (const chunk of chunks("/v1/chat/completions", body, control.signal)) {
        const part = chunk.choices?.[0],
          ours = chunk.affectlens ?? part?.affectlens;
        if (!started) begin(ours ?? {});
        if (!part && !ours) continue;
        const aside = part?.index === 1 || ours?.unsteered;
        if (ours?.id) own.add(ours.id);
        const into = aside ? other : conversation;
        if (!into) continue;
        const piece = ours?.text ?? part?.delta?.content ?? "";
        if (!aside) reply += part?.delta?.content ?? "";
        if (piece || ours?.scores) {
          into.push({ text: piece, role: ours?.role ?? "assistant", scores: ours?.scores, token: ours?.token });
          if (!aside) tokens += 1;
          if (tokens === 1) say(make("span", { class: "dots" }, "Generating"));
        }
        for (const alert of ours?.alerts ?? []) {
          if (!into.alerts.some((one) => one.rule === alert.rule && one.token === alert.token)) into.alerts.push(alert);
        }
        if (ours?.summary && !aside) last = ours;
        if (part?.finish_reason && !aside) {
          finish = ours?.finish ?? part.finish_reason;
          took = performance.now() - started;
        }
        reader.grow();
      }
      ended();
    } catch (error) {
      if (error.name === "AbortError") {
        finish = "stopped by you";
        ended();
      } else {
        if (!reply) {
          problem(error, () => reply_again());
          if (error.retry) setTimeout(() => status.querySelector("button")?.removeAttribute("disabled"), 1000 * error.retry);
        } else {
          messages.push({ role: "assistant", content: reply });
          problem(error);
        }
        reader.streaming(false);
        busy(null);
      }
    }

    function ended() {
      busy(null);
      reader.grow();
      reader.streaming(false);
      if (reply) messages.push({ role: "assistant", content: reply });
      else if (!started) messages.pop();
      const seconds = started ? (took || performance.now() - started) / 1000 : 0;
      const clamped = Object.entries(last.steering?.clamped ?? {});
      const used = Object.entries(last.steering?.used ?? {});
      const words =
        {
          stop: "finished",
          length: "reached its longest length",
          stopped: "stopped by a rule",
          timeout: "ended by the time limit",
          shutdown: "ended because the server shuts down",
        }[finish] ?? finish;
      say(
        make("span", {}, words),
        make("span", {}, count(tokens, "token")),
        seconds > 0.2 && make("span", {}, `${(tokens / seconds).toFixed(0)} a second`),
        last.seed !== undefined && make("span", {}, `seed ${last.seed}`),
        used.length
          ? make("span", {}, `steered by ${used.map(([name, strength]) => `${name} ${signed(strength, 3)}`).join(", ")}`)
          : null,
        clamped.length
          ? make(
              "span",
              { class: "warn" },
              `kept in the safe range: ${clamped.map(([name, strength]) => `${name} ${describe(strength, last.steering, name)}`).join(", ")}`,
            )
          : null,
        last.trace && make("a", { href: `#/history/${encodeURIComponent(last.trace)}` }, "Stored conversation"),
      );
      announce(`The reply ${words}, ${count(tokens, "token")}.`);
      // The longer of the two replies has pulled the other one out of sight.
      if (other && reader.transcript.turns[turn]) reader.transcript.turns[turn - 1]?.node.scrollIntoView({ block: "start" });
      if (last.trace) enrich(last.trace, conversation);
    }
  }

  function reply_again() {
    say();
    reply();
  }

  const describe = (given, steering, name) =>
    `${signed(steering.asked?.[name] ?? given, 3)} became ${signed(steering.used?.[name] ?? 0, 3)}`;

  /** The stored trace has what a stream has not: what the words alone read, and the gap. */
  async function enrich(trace, shown) {
    const stored = await get(`/v1/traces/${encodeURIComponent(trace)}`).catch(() => null);
    if (!stored || conversation !== shown || running || !(stored.visible || stored.gap || stored.steered)) return;
    for (const kind of ["visible", "gap", "steered"]) {
      for (const [name, values] of Object.entries(stored[kind] ?? {})) {
        const column = shown.column(kind, name);
        values.forEach((value, i) => {
          const at = shown.find(i);
          if (at >= 0) column.set(at, value ?? NaN);
        });
      }
    }
    reader.refresh();
  }

  /** Read what was written, without a reply. */
  async function readOnly() {
    const text = words.value.trim();
    if (!text) {
      words.focus();
      toast("Write or paste what is to be read first.");
      return;
    }
    busy({ abort() {} });
    say(make("span", { class: "dots" }, "Reading"));
    try {
      const trace = await post("/v1/score", { text });
      messages = [];
      beside = new Map();
      conversation = Conversation.read(trace);
      words.value = "";
      fit();
      reader.show(conversation);
      empty();
      say(make("span", {}, `${count(conversation.spoken.length, "token")} read`), make("span", {}, "no reply was asked for"));
    } catch (error) {
      problem(error, readOnly);
    } finally {
      busy(null);
    }
  }

  // ── other replies ──
  function followReply(reply) {
    if (running) return;
    followed = reply;
    node.classList.add("follows");
    following.hidden = false;
    following.replaceChildren(
      icon("live"),
      make("span", {}, "Following a reply for ", make("b", {}, reply.key || "a caller without a key")),
      make("div", { class: "spring" }),
      make("a", { href: `#/history/${encodeURIComponent(reply.trace)}` }, "Stored conversation"),
      button("Back to your conversation", () => unfollow(), { kind: "small" }),
    );
    scroller.querySelector(".blank")?.remove();
    reader.show(reply.conversation, { streaming: !reply.ended });
    say();
    node.dataset.part = "talk";
    narrow.querySelector("input").checked = true;
  }

  function unfollow(show = true) {
    if (!followed) return;
    followed = null;
    node.classList.remove("follows");
    following.hidden = true;
    if (show) {
      reader.show(conversation, { beside });
      empty();
    }
  }

  onTraffic((event, reply) => {
    if (!reply || reply !== followed) return;
    if (event === "done") reader.streaming(false);
    reader.grow();
  });

  empty();
  return {
    node,
    show(parts, params) {
      const steer = params.get("steer");
      if (steer && catalog.emotion.has(steer)) {
        node.dataset.part = "steer";
        narrow.querySelectorAll("input").forEach((input) => {
          input.checked = input.value === "steer";
        });
        dials.set(steer, dials.strengths.get(steer) ?? 0);
      }
      const reply = traffic.replies.get(params.get("follow"));
      if (reply) followReply(reply);
      const watch = params.get("watch");
      if (watch && catalog.emotion.has(watch)) reader.watch(watch);
    },
  };
}
