// Draws each figure of the page with the inlined plotly.js, in the page's own text colour.
const ink = () => getComputedStyle(document.body).getPropertyValue("--opd-chart-text").trim();

for (const figure of document.querySelectorAll(".opd-chart")) {
  const { data, layout } = JSON.parse(figure.querySelector("script.opd-figure").textContent);
  const box = figure.querySelector("div");
  layout.autosize = true;
  layout.font = { ...layout.font, color: ink() };
  Plotly.newPlot(box, data, layout, {
    displaylogo: false,
    displayModeBar: false,
    responsive: true,
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    Plotly.relayout(box, { "font.color": ink() }),
  );
}
