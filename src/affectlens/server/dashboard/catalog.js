// What is served here: models, emotions, rules. Loaded once; rules again when they change.

import { get } from "./api.js";

export const catalog = {
  models: [],
  emotions: [],
  names: [],
  watched: [],
  layer: null,
  steerLayer: null,
  unit: "z",
  unsafe: false,
  rules: [],
  /** Name to {id, valence, arousal, safe, watched, cluster}. */
  emotion: new Map(),
};

const watchers = new Set();
/** `watcher()` is called when there is news, and at once if something is known already. */
export function onCatalog(watcher) {
  watchers.add(watcher);
  if (catalog.names.length) watcher();
}
const changed = () => watchers.forEach((watcher) => watcher());

export async function loadCatalog() {
  const [models, emotions, rules] = await Promise.all([get("/v1/models"), get("/v1/emotions"), get("/v1/rules")]);
  catalog.models = models.data.map((model) => model.id);
  catalog.emotions = emotions.data;
  catalog.names = emotions.data.map((emotion) => emotion.id);
  catalog.emotion = new Map(emotions.data.map((emotion) => [emotion.id, emotion]));
  const watched = emotions.data.filter((emotion) => emotion.watched).map((emotion) => emotion.id);
  catalog.watched = watched.length ? watched : catalog.names.slice(0, 4);
  Object.assign(catalog, {
    layer: emotions.layer,
    steerLayer: emotions.steer_layer,
    unit: emotions.unit,
    unsafe: Boolean(emotions.allow_unsafe),
  });
  catalog.rules = rules.data;
  changed();
}

export async function loadRules() {
  catalog.rules = (await get("/v1/rules")).data;
  changed();
}

const COMPARISON = new RegExp(
  String.raw`(?:\b(mean|rise|gap|other)\s*\(\s*)?` + // a window, or another kind of score
    String.raw`(?:([\w-]+|"[^"]+"|'[^']+'|\[[^\]]+\])\s*\.\s*)?` + // whose words
    String.raw`("[^"]+"|'[^']+'|\[[^\]]+\]|[^\W\d][\w-]*)` +
    String.raw`(?:\s*,\s*(\d+))?\s*\)?\s*(>=|<=|≥|≤|>|<)\s*([-+−]?(?:\d+\.?\d*|\.\d+))`,
  "giu",
);

/**
 * The lines that rules draw into a chart of readings: where a score, or its mean, is compared with a number.
 * What a rule asks to be released by is left out, and what is no reading in the reply: rises, gaps, other speakers.
 */
export function thresholds(rules, names) {
  const found = [];
  for (const rule of rules) {
    const condition = rule.text.split(/\s(?:until|cooldown)\s/i)[0];
    for (const [, how, speaker, name, window, sign, number] of condition.matchAll(COMPARISON)) {
      const bare = name.replace(/^["'[]|["'\]]$/g, "");
      if (!names.includes(bare) || (how && how.toLowerCase() !== "mean") || (speaker && speaker !== "assistant")) continue;
      const value = Number(number.replace("−", "-"));
      if (!found.some((line) => line.name === bare && line.value === value)) {
        found.push({
          name: bare,
          value,
          sign,
          window: window ? Number(window) : null,
          rule: rule.name,
          armed: rule.armed !== false,
        });
      }
    }
  }
  return found;
}
