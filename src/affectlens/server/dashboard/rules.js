// The rules: which are armed, and an editor in which a rule is tried before it is armed.

import { make, button, icon, signed, plain, time, menu, count, toast, announce, passage } from "./dom.js";
import { post, remove } from "./api.js";
import { catalog, loadRules, onCatalog } from "./catalog.js";

const rate = (value) => plain(value, value < 100 ? 1 : 0);
export const expectation = (three) => `${rate(three[0])} [${rate(three[1])}, ${rate(three[2])}]`;

/** Mute a rule for a while. */
export function mutes(rule) {
  const until = rule.muted_until && new Date(rule.muted_until) > new Date() ? rule.muted_until : null;
  const mute = async (minutes) => {
    try {
      await post(`/v1/rules/${encodeURIComponent(rule.id)}/mute`, { minutes });
      await loadRules();
      toast(minutes ? `${rule.name} is muted` : `${rule.name} is no longer muted`);
    } catch (error) {
      toast(error.message, { kind: "bad" });
    }
  };
  const waits = [[60, "for an hour"], [480, "for eight hours"], [1440, "for a day"], ...(until ? [[0, "not any more"]] : [])];
  return menu(
    until ? "Muted" : "Mute rule",
    "mute",
    "ghost small",
    waits.map(([minutes, words]) => [words, () => mute(minutes)]),
  );
}

export function rulesIn(host) {
  const list = make("ol", { class: "rulelist" });
  const text = make("textarea", {
    class: "field code",
    rows: 2,
    spellcheck: "false",
    autocomplete: "off",
    placeholder: "cornered: desperate > 3 for 20 tokens until < 1",
    "aria-label": "Rule",
    "aria-describedby": "rule-fault",
  });
  const fault = make("div", { class: "fault", id: "rule-fault", role: "alert" });
  const outcome = make("div", { class: "outcome" });
  let tried = "",
    editing = null;
  const trial = button("Try it", () => attempt(), { kind: "main" });
  const arm = button("Arm", () => save(true), { sign: "alerts" });
  const keep = button("Keep without arming", () => save(false), { kind: "ghost" });
  const drop = button("New rule", () => edit(null), { kind: "ghost small", sign: "plus" });
  const title = make("h2", {}, "New rule");
  const editor = make(
    "form",
    {
      class: "panel editor",
      onsubmit: (event) => {
        event.preventDefault();
        attempt();
      },
    },
    make(
      "header",
      {},
      title,
      make("span", { class: "quiet" }, "numbers are standard deviations from the baseline (z)"),
      make("div", { class: "spring" }),
      drop,
    ),
    text,
    fault,
    make("div", { class: "row" }, trial, arm, keep),
    outcome,
    manual(),
  );
  host.append(
    editor,
    make("section", { class: "panel", "aria-label": "Rules" }, make("header", {}, make("h2", {}, "Rules")), list),
  );

  const current = () => text.value.trim().replace(/\s*\n\s*/g, " ");
  function changed() {
    const fresh = current() !== tried;
    trial.classList.toggle("main", fresh);
    arm.classList.toggle("main", !fresh && tried !== "");
    arm.disabled = fresh || !tried;
    arm.title = arm.disabled ? "Try the rule first" : "";
    keep.disabled = trial.disabled = !current();
    if (fresh) outcome.classList.add("old");
    else outcome.classList.remove("old");
  }
  text.addEventListener("input", () => {
    fault.replaceChildren();
    text.removeAttribute("aria-invalid");
    changed();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      attempt();
    }
  });
  changed();

  /** A message of the rule language ends with the rule and a line that marks the place: shown under the rule. */
  function wrong(error) {
    const [line, rule, marks] = String(error.message).split("\n");
    const column = line.match(/column (\d+)/);
    fault.replaceChildren(make("p", {}, icon("cross"), make("span", {}, line)));
    text.setAttribute("aria-invalid", "true");
    if (rule !== undefined && marks !== undefined) {
      const start = marks.indexOf("^"),
        end = marks.lastIndexOf("^") + 1;
      fault.append(make("pre", {}, rule.slice(2, start), make("mark", {}, rule.slice(start, end) || " "), rule.slice(end)));
    }
    if (column) {
      const at = Number(column[1]) - 1,
        length = marks ? (marks.match(/\^/g) ?? []).length : 1;
      text.focus();
      text.setSelectionRange(at, Math.min(text.value.length, at + length));
    }
  }

  async function attempt() {
    const rule = current();
    if (!rule) return;
    fault.replaceChildren();
    trial.disabled = true;
    outcome.classList.remove("old");
    outcome.replaceChildren(make("p", { class: "dots" }, "Running it along the stored replies and the neutral dialogues"));
    try {
      const found = await post("/v1/rules/try", { text: rule });
      tried = rule;
      outcome.replaceChildren(...shown(found));
      announce("The rule was tried");
    } catch (error) {
      outcome.replaceChildren();
      wrong(error);
    }
    changed();
  }

  async function save(armed) {
    try {
      const before = editing,
        saved = await post("/v1/rules", { text: current(), armed });
      // The server replaces a rule of the same name; one that got another name leaves the old one behind.
      if (before && before.source !== "file" && before.name !== saved.name)
        await remove(`/v1/rules/${encodeURIComponent(before.id)}`);
      await loadRules();
      toast(armed ? "The rule is armed" : "The rule is kept, not armed");
      edit(null);
    } catch (error) {
      wrong(error);
    }
  }

  function edit(rule) {
    editing = rule;
    title.textContent = rule ? `Change ${rule.name}` : "New rule";
    text.value = rule?.text ?? "";
    tried = "";
    fault.replaceChildren();
    outcome.replaceChildren();
    changed();
    if (rule) {
      text.focus();
      editor.scrollIntoView({ block: "nearest" });
    }
  }

  const act = async (work, said) => {
    try {
      await work();
      await loadRules();
      announce(said);
    } catch (error) {
      toast(error.message, { kind: "bad" });
      list.replaceChildren(...catalog.rules.map(row));
    }
  };

  function row(rule) {
    const fixed = rule.source === "file";
    const on = make("input", {
      type: "checkbox",
      role: "switch",
      "aria-label": `${rule.name} is armed`,
      disabled: fixed,
      onchange: () => act(() => post("/v1/rules", { text: rule.text, armed: on.checked }), on.checked ? "Armed" : "Not armed"),
    });
    on.checked = rule.armed;
    const until = rule.muted_until && new Date(rule.muted_until) > new Date() ? rule.muted_until : null;
    const sure = button(
      "Delete",
      () => {
        if (sure.dataset.sure) return act(() => remove(`/v1/rules/${encodeURIComponent(rule.id)}`), "Deleted");
        sure.dataset.sure = "yes";
        sure.querySelector("span").textContent = "Really delete";
        setTimeout(() => {
          delete sure.dataset.sure;
          if (sure.isConnected) sure.querySelector("span").textContent = "Delete";
        }, 4000);
      },
      { kind: "ghost small" },
    );
    return make(
      "li",
      { class: rule.armed ? "" : "over" },
      make("label", { class: "switch", title: fixed ? "This rule stands in the server's file" : "" }, on, make("i")),
      make(
        "div",
        { class: "what" },
        rule.name === rule.text ? null : make("b", {}, rule.name),
        make("code", {}, rule.text),
        make(
          "span",
          { class: "facts" },
          rule.problem
            ? make("span", { class: "warn" }, `cannot be watched: ${rule.problem}`)
            : rule.expected
              ? make("span", {}, `${expectation(rule.expected)} false alarms per 1,000 replies`)
              : make("span", {}, "never tried"),
          until && make("span", { class: "warn" }, "muted until ", time(until)),
          fixed && make("span", {}, "from the server's file"),
          (rule.actions ?? []).length
            ? make("span", {}, `does: ${rule.actions.map((action) => action.do ?? action).join(", ")}`)
            : null,
        ),
      ),
      make(
        "div",
        { class: "row" },
        mutes(rule),
        button(fixed ? "Copy" : "Change", () => edit(rule), { kind: "ghost small" }),
        fixed ? null : sure,
      ),
    );
  }
  onCatalog(() =>
    list.replaceChildren(
      ...(catalog.rules.length ? catalog.rules.map(row) : [make("li", { class: "none quiet" }, "There is no rule yet.")]),
    ),
  );
}

/** What a trial found: how often it will cry wolf, on what, and where it would have fired. */
function shown(found) {
  const sources = [
    ["On stored replies", found.history, "nothing is stored yet"],
    ["On neutral dialogues", found.neutral, "not tried"],
  ];
  const most = Math.max(10, ...sources.map(([, trial]) => trial?.per_thousand.high ?? 0));
  const scale = 10 ** Math.ceil(Math.log10(most));
  const at = (value) => `${(100 * Math.sqrt(Math.max(0, value) / scale)).toFixed(1)}%`; // roots: small rates matter most
  const rows = sources.map(([title, trial, without]) =>
    make(
      "div",
      { class: "trial" },
      make("dt", {}, title),
      trial
        ? make(
            "dd",
            {},
            make(
              "span",
              { class: "rate" },
              make("b", {}, rate(trial.per_thousand.value)),
              make("span", {}, `[${rate(trial.per_thousand.low)}, ${rate(trial.per_thousand.high)}]`),
            ),
            make(
              "span",
              {
                class: "interval",
                vars: {
                  "--low": at(trial.per_thousand.low),
                  "--high": at(trial.per_thousand.high),
                  "--at": at(trial.per_thousand.value),
                },
                role: "img",
                "aria-label": "rate with its 95 % interval",
              },
              make("i"),
              make("b"),
            ),
            make(
              "span",
              { class: "quiet" },
              `${count(trial.alarmed, "reply", "replies")} of ${trial.turns.toLocaleString("en")} fired, in ${count(trial.conversations, "conversation")}` +
                (trial.next_thousand ? `; ${trial.next_thousand[0]} to ${trial.next_thousand[1]} in the next 1,000` : ""),
            ),
          )
        : make("dd", { class: "quiet" }, without),
    ),
  );
  const passages = found.passages ?? [];
  return [
    make("h3", {}, "Expected alarms per 1,000 replies, 95 % interval"),
    make("dl", { class: "trials" }, rows),
    make("h3", {}, passages.length ? `Would have fired here (${passages.length})` : "It would not have fired on anything stored"),
    make(
      "ol",
      { class: "passages" },
      passages.slice(0, 8).map((one) =>
        make(
          "li",
          {},
          make(
            "a",
            { href: `#/history/${encodeURIComponent(one.trace)}?token=${one.token}` },
            make("span", { class: "quote", dir: "auto" }, passage(one.words)),
            make(
              "span",
              { class: "quiet" },
              Object.entries(one.scores ?? {})
                .map(([name, z]) => `${name} ${signed(z, 1)}`)
                .join(", "),
            ),
          ),
        ),
      ),
    ),
  ];
}

const manual = () =>
  make(
    "details",
    { class: "manual" },
    make("summary", {}, "How rules are written"),
    make(
      "dl",
      {},
      [
        ["desperate > 3", "the score at a token of the reply"],
        ["user.afraid > 2", "in the user's words"],
        ["mean(desperate, 50) > 2", "mean over the latest 50 tokens of the speaker"],
        ["rise(x, 30) > 2", "how much the score rises over 30 tokens"],
        ["gap(x) > 2", "inner above what the words alone read"],
        ["and, or, not, ( )", "together"],
        ["… for 20 tokens", "all before it, 20 tokens in a row"],
        ["… until < 1", "cannot fire again before this is true"],
        ["… cooldown 100 tokens", "nor at the next 100 tokens"],
        ['"at ease"', "names with spaces stand in quotes"],
        ["name: …", "what it is called"],
      ].map(([form, meaning]) => make("div", {}, make("dt", {}, make("code", {}, form)), make("dd", {}, meaning))),
    ),
  );
