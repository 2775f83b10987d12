// Draws each figure of the page with the inlined plotly.js, in the page's own text colour.

// The global of plotly.js, which has no types here.
const { Plotly } = /** @type {any} */ (window);

const textColour = () =>
  getComputedStyle(document.body).getPropertyValue("--opd-chart-text").trim();

for (const figure of document.querySelectorAll(".opd-chart")) {
  const block = figure.querySelector("script.opd-figure");
  const { data, layout } = JSON.parse(block?.textContent ?? "");
  const box = figure.querySelector("div");
  layout.autosize = true;
  layout.font = { ...layout.font, color: textColour() };
  const config = { displaylogo: false, displayModeBar: false, responsive: true };
  Plotly.newPlot(box, data, layout, config);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    Plotly.relayout(box, { "font.color": textColour() });
  });
}
