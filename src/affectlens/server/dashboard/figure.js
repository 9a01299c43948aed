// Figures of studies. Plotly is five megabytes, so it is fetched when the first figure comes near the screen, and not before.

import { make, onTheme, colour, loading, broken } from "./dom.js";
import { get } from "./api.js";

const [NARROW, NEUTRAL] = [480, "#fbfbfa"];
let library = null;

function plotly() {
  library ??= new Promise((resolve, reject) => {
    const script = make("script", { src: "/plotly.min.js" });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => { library = null; reject(new Error("The drawing library could not be loaded from this server.")); });
    document.head.append(script);
  });
  return library;
}

/** Figures come without background and font colour; both follow the page, in light and in dark. */
function dressed({ data, layout: given }, width) {
  const layout = structuredClone(given), narrow = width < NARROW;
  const [ink, quiet, rule, paper] = ["--ink", "--quiet", "--grid", "--panel"].map(colour);
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.template ??= {};
  const base = (layout.template.layout ??= {});
  base.font = { ...base.font, color: ink, size: narrow ? 11 : 12 };
  base.hoverlabel = { bgcolor: paper, bordercolor: quiet, font: { color: ink, size: 12 } };
  for (const axis of ["xaxis", "yaxis"]) base[axis] = { ...base[axis], gridcolor: rule, zerolinecolor: rule, linecolor: quiet, tickcolor: quiet };
  const scale = layout.coloraxis?.colorscale;
  if (Array.isArray(scale)) layout.coloraxis.colorscale = scale.map(([at, own]) => [at, own === NEUTRAL ? paper : own]);
  if (layout.coloraxis && layout.yaxis?.scaleanchor) layout.height = Math.min(layout.height || width, width - 40);
  if (narrow) layout.margin = { l: 44, r: 6, ...(layout.coloraxis ? layout.margin : {}) };
  const shown = data.map((trace) => (trace.meta === "labels" || trace.meta === "labels, narrow" ? { ...trace, visible: (trace.meta === "labels, narrow") === narrow } : trace));
  return [shown, layout];
}

const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) { near.unobserve(target); target.begin(); }
}, { rootMargin: "400px" });

/** A figure of a run: its picture when it comes near, its title and what a reader needs to read it. */
export function figure(run, { id, title, caption }) {
  const plot = make("div", { class: "plot" }, loading(5));
  let drawn = null;
  const draw = async () => {
    const [Plotly, data] = [await plotly(), drawn];
    const [traces, layout] = dressed(data, plot.clientWidth);
    plot.replaceChildren();
    await Plotly.newPlot(plot, traces, layout, { displayModeBar: false, responsive: false });
    plot.classList.add("done");
  };
  plot.begin = async () => {
    try {
      drawn = await get(`/v1/studies/${encodeURIComponent(run)}/figures/${encodeURIComponent(id)}`);
      await draw();
      let width = plot.clientWidth;
      new ResizeObserver(() => { if (plot.clientWidth && Math.abs(plot.clientWidth - width) > 8) { width = plot.clientWidth; draw(); } }).observe(plot);
      onTheme(() => { if (plot.isConnected) draw(); });
    } catch (error) {
      plot.replaceChildren(broken(error, plot.begin));
    }
  };
  near.observe(plot);
  return make("figure", { class: "figure", id: `figure-${id}` }, make("h3", {}, title), plot, make("figcaption", {}, caption));
}
