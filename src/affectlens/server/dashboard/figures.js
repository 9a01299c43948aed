// Figures of studies, in a document of their own: Plotly writes style attributes, which the policy of this page forbids.
//
// Plotly is five megabytes; it is fetched when the first figure comes near the screen, and not before.

import { make, onTheme, colour, loading, broken } from "./dom.js";
import { get } from "./api.js";

const [NARROW, NEUTRAL] = [480, "#fbfbfa"];

/** Figures come without background and font colour; both follow the page, in light and in dark. */
function dressed({ data, layout: given }, width) {
  const layout = structuredClone(given),
    narrow = width < NARROW;
  const [ink, quiet, rule, paper] = ["--ink", "--quiet", "--grid", "--panel"].map(colour);
  layout.width = width;
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.template ??= {};
  const base = (layout.template.layout ??= {});
  base.font = { ...base.font, color: ink, size: narrow ? 11 : 12 };
  base.hoverlabel = { bgcolor: paper, bordercolor: quiet, font: { color: ink, size: 12 } };
  for (const axis of ["xaxis", "yaxis"])
    base[axis] = { ...base[axis], gridcolor: rule, zerolinecolor: rule, linecolor: quiet, tickcolor: quiet };
  const scale = layout.coloraxis?.colorscale;
  if (Array.isArray(scale)) layout.coloraxis.colorscale = scale.map(([at, own]) => [at, own === NEUTRAL ? paper : own]);
  if (layout.coloraxis && layout.yaxis?.scaleanchor) layout.height = Math.min(layout.height || width, width - 40);
  if (narrow) layout.margin = { l: 44, r: 6, ...(layout.coloraxis ? layout.margin : {}) };
  const shown = data.map((trace) =>
    trace.meta === "labels" || trace.meta === "labels, narrow"
      ? { ...trace, visible: (trace.meta === "labels, narrow") === narrow }
      : trace,
  );
  return [shown, layout];
}

/** The frame with the figures of a run: [{id, title, caption}]. It is as high as what stands in it. */
export function figures(run, list) {
  const frame = make("iframe", { class: "figures", title: "Figures", src: "/dashboard/figures.html" });
  frame.addEventListener("load", () => fill(frame, run, list), { once: true });
  return frame;
}

function fill(frame, run, list) {
  const { contentDocument: sheet, contentWindow: view } = frame;
  const theme = () => {
    const own = document.documentElement.dataset.theme;
    if (own) sheet.documentElement.dataset.theme = own;
    else delete sheet.documentElement.dataset.theme;
  };
  theme();
  let library = null;
  const plotly = () =>
    (library ??= new Promise((resolve, reject) => {
      const script = make("script", { src: "/plotly.min.js" });
      script.addEventListener("load", () => resolve(view.Plotly));
      script.addEventListener("error", () => {
        library = null;
        reject(new Error("The drawing library could not be loaded from this server."));
      });
      sheet.head.append(script);
    }));
  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries)
        if (isIntersecting) {
          near.unobserve(target);
          target.begin();
        }
    },
    { rootMargin: "400px" },
  );
  const plots = list.map(({ id, title, caption }) => {
    const plot = make("div", { class: "plot" }, loading(5));
    let found = null,
      width = 0;
    plot.draw = async () => {
      if (!found || !plot.clientWidth) return;
      const Plotly = await plotly();
      width = plot.clientWidth;
      const [data, layout] = dressed(found, width);
      plot.replaceChildren();
      await Plotly.newPlot(plot, data, layout, { displayModeBar: false });
      plot.classList.add("done");
    };
    plot.begin = async () => {
      try {
        found = await get(`/v1/studies/${encodeURIComponent(run)}/figures/${encodeURIComponent(id)}`);
        plot.parentNode.classList.toggle("across", Boolean(found.layout.meta?.wide));
        await plot.draw();
      } catch (error) {
        plot.replaceChildren(broken(error, plot.begin));
      }
    };
    plot.resized = () => {
      if (found && Math.abs(plot.clientWidth - width) > 8) plot.draw();
    };
    sheet.body.append(
      make("figure", { class: "figure", id: `figure-${id}` }, make("h3", {}, title), plot, make("figcaption", {}, caption)),
    );
    near.observe(plot);
    return plot;
  });
  new ResizeObserver(() => {
    frame.style.height = `${sheet.body.scrollHeight}px`;
    plots.forEach((plot) => plot.resized());
  }).observe(sheet.body);
  onTheme(() => {
    if (!frame.isConnected) return false;
    theme();
    plots.forEach((plot) => plot.draw());
    return true;
  });
}
