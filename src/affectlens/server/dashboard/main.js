// The frame: which page is shown, the state of the server, the key, the colours.

import { make, button, icon, isDark, themeChanged, toast, broken, loading, announce } from "./dom.js";
import { get, onKey, onReach, hasKey, forgetKey } from "./api.js";
import { catalog, loadCatalog, onCatalog } from "./catalog.js";
import { watchTraffic, onTraffic } from "./traffic.js";
import { live } from "./live.js";
import { history } from "./history.js";
import { alerts } from "./alerts.js";
import { map } from "./map.js";
import { studies } from "./studies.js";

const PAGES = [
  ["live", "Live", live],
  ["history", "History", history],
  ["alerts", "Alerts", alerts],
  ["map", "Map", map],
  ["studies", "Studies", studies],
];

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const state = document.getElementById("state");
const banner = document.getElementById("banner");
const opened = new Map(); // name to page, made when it is first shown; a page that is left stays as it is
const links = new Map();
let current = "",
  ready = false;

// ── pages ──

for (const [name, title] of PAGES) {
  const badge = make("span", { class: "badge" });
  badge.hidden = true;
  const link = make("a", { href: `#/${name}` }, icon(name), make("span", {}, title), badge);
  links.set(name, Object.assign(link, { badge }));
  nav.append(link);
}

function route() {
  const [path, search] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...parts] = path.split("/").map(decodeURIComponent);
  const [id, title, open] = PAGES.find(([each]) => each === name) ?? PAGES[0];
  if (!ready) return;
  if (!opened.has(id)) {
    opened.set(id, open());
    main.append(opened.get(id).node);
  }
  for (const [each, page] of opened) page.node.hidden = each !== id;
  for (const [each, link] of links) {
    if (each === id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${title} · affectlens`;
  document.body.dataset.page = id;
  const page = opened.get(id);
  page.show(parts, new URLSearchParams(search ?? ""));
  if (current && current !== id) {
    page.node.querySelector("h1")?.focus({ preventScroll: true });
    scrollTo(0, 0);
    announce(title);
  }
  current = id;
}
addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  const heading = main.querySelector("section.page:not([hidden]) h1");
  (heading ?? main).focus();
});

// ── colours ──

const THEMES = ["system", "light", "dark"];
const theme = button(
  "",
  () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3];
    if (next === "system") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("affectlens-theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("affectlens-theme", next);
    }
    named();
    themeChanged();
  },
  { words: false, kind: "ghost" },
);
function named() {
  const now = document.documentElement.dataset.theme ?? "system";
  theme.replaceChildren(icon(now));
  theme.title = {
    system: `Colours: as the system (${isDark() ? "dark" : "light"})`,
    light: "Colours: light",
    dark: "Colours: dark",
  }[now];
  theme.setAttribute("aria-label", `${theme.title}. Change`);
}
named();

// ── the server ──

const lamp = make("span", { class: "lamp" });
const served = make("span", { class: "served" });
const keyButton = button(
  "Forget the API key",
  () => {
    forgetKey();
    location.reload();
  },
  { sign: "cross", words: false, kind: "ghost" },
);
state.append(make("span", { class: "server" }, lamp, served), keyButton, theme);
keyButton.hidden = true;

onCatalog(() => {
  served.textContent = catalog.models.join(", ");
  served.title = `reads layer ${catalog.layer}${catalog.steerLayer === null ? "" : `, steers layer ${catalog.steerLayer}`}`;
  keyButton.hidden = !hasKey();
});

let retry = 0;
function lit(kind, text) {
  lamp.className = `lamp ${kind}`;
  lamp.title = text;
}
onReach((reached) => {
  clearTimeout(retry);
  lit(reached ? "good" : "bad", reached ? "the server answers" : "the server does not answer");
  document.body.classList.toggle("offline", !reached);
  if (reached) {
    banner.replaceChildren();
    if (!ready) start();
    else loadCatalog().then(route, () => {});
    return;
  }
  banner.replaceChildren(
    make(
      "div",
      { class: "banner bad" },
      make("b", {}, "Offline"),
      make("span", {}, "The server does not answer. What is shown may be old; this page connects again by itself."),
      button("Try now", knock, { kind: "small" }),
    ),
  );
  const wait = () => {
    retry = setTimeout(() => knock().then(wait), 3000);
  };
  wait();
});
const knock = () => get("/health").catch(() => {});

const UNREADY = {
  model: "The model does not answer",
  store: "Conversations cannot be kept: the store does not answer",
  accepting: "The server is shutting down and takes no more replies",
};

/** Whether the server can do its work: what /ready says, in its words. */
async function check() {
  const response = await fetch("/ready", { cache: "no-store" }).catch(() => null);
  if (!response) return;
  const said = await response.json().catch(() => ({}));
  if (response.ok) {
    lit("good", "the server is ready");
    banner.querySelector(".unready")?.remove();
  } else {
    lit("warn", "the server is not ready");
    const reasons = Object.entries(UNREADY)
      .filter(([part]) => said[part] === false)
      .map(([, words]) => words);
    banner.replaceChildren(
      make(
        "div",
        { class: "banner warn unready" },
        make("b", {}, "Not ready"),
        make("span", {}, `${reasons.join("; ") || "the server does not say why"}.`),
      ),
    );
  }
}

// ── the key ──

const field = make("input", {
  class: "field",
  type: "password",
  autocomplete: "off",
  spellcheck: "false",
  "aria-label": "API key",
  required: true,
});
const wrong = make("p", { class: "warn", role: "alert" });
const dialog = make(
  "dialog",
  { class: "dialog", "aria-labelledby": "key-title" },
  make(
    "form",
    { method: "dialog" },
    make("h2", { id: "key-title" }, "This server asks for an API key"),
    make("p", { class: "quiet" }, "It is kept in this tab until the tab is closed, and sent to this server only."),
    field,
    wrong,
    make(
      "div",
      { class: "row" },
      make("div", { class: "spring" }),
      make("button", { type: "button", class: "button ghost", value: "cancel", onclick: () => dialog.close("") }, "Cancel"),
      make("button", { class: "button main", value: "ok" }, "Continue"),
    ),
  ),
);
document.body.append(dialog);
onKey(
  (refused) =>
    new Promise((resolve, reject) => {
      wrong.textContent = refused ? "The server did not accept that key." : "";
      field.value = "";
      dialog.returnValue = "";
      dialog.onclose = () => {
        if (dialog.returnValue === "ok" && field.value.trim()) resolve(field.value.trim());
        else
          reject(
            Object.assign(new Error("Nothing can be shown without a key of this server."), {
              title: "An API key is needed",
              status: 401,
            }),
          );
      };
      dialog.showModal();
      field.focus();
    }),
);

// ── alerts, wherever one is ──

let unseen = 0;
function badge() {
  const { badge: node } = links.get("alerts");
  node.textContent = unseen > 99 ? "99+" : String(unseen);
  node.hidden = !unseen;
  links.get("alerts").setAttribute("aria-label", unseen ? `Alerts, ${unseen} open` : "Alerts");
}
async function countOpen() {
  const page = await get("/v1/alerts?state=open&limit=100").catch(() => null);
  if (page) {
    unseen = page.data.length;
    badge();
  }
}
addEventListener("affectlens-alerts", countOpen);
onTraffic((event, reply, data) => {
  if (event !== "alert") return;
  unseen += 1;
  badge();
  announce(`Alert: ${data.rule}`);
  if (current !== "live" && current !== "alerts")
    toast(`${data.rule} fired: “${(data.words ?? "").slice(-60)}”`, {
      kind: "alert",
      href: `#/history/${encodeURIComponent(data.trace)}?token=${data.token}`,
    });
});

// ── begin ──

async function start() {
  const place = make("section", { class: "page starting" }, loading(6));
  main.replaceChildren(place);
  try {
    await loadCatalog();
  } catch (error) {
    place.replaceChildren(broken(error, start));
    return;
  }
  if (ready) return;
  ready = true;
  main.replaceChildren();
  lit("good", "the server answers");
  route();
  countOpen();
  check();
  setInterval(check, 20000);
  watchTraffic();
}

start();
