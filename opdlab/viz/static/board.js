// RunBoard: small plots on one axis of steps; a slider (or the pointer) reads all of them at one step.

import { clamp, define, make, number, put } from "./core.js";
import { linePlot, valueAt } from "./lines.js";

define("board", ({ box, data, state }) => {
  const said = make("div", "opd-said", data.said);
  const bar = make("div", "opd-board-bar");
  const plots = make("div", "opd-plots");
  const several = data.runs.length > 1;
  const last = data.plots.length ? data.plots[0].x[1] : 0;
  const first = data.plots.length ? data.plots[0].x[0] : 0;
  const slider = put(make("input"), {
    type: "range",
    min: first,
    max: last,
    step: 1,
    "aria-label": "Step to read the curves at",
  });
  const at = make("span", "opd-at");
  let drawn = [];
  let step = NaN;

  const read = () => {
    for (const { plot, told, mark } of drawn) {
      mark(step);
      if (Number.isNaN(step)) told.textContent = plot.told;
      else {
        const lines = plot.lines.filter(
          (line) =>
            line.kind !== "dots" &&
            !(line.kind === "faint" && plot.lines.some((l) => l !== line && l.name === line.name)),
        );
        told.textContent = lines
          .map((line) => `${several ? `${line.name} ` : ""}${number(valueAt(line, step))}`)
          .join(" · ");
      }
    }
    at.textContent = Number.isNaN(step) ? "" : `step ${step}`;
    slider.setAttribute(
      "aria-valuetext",
      [at.textContent, ...drawn.map(({ plot, told }) => `${plot.label} ${told.textContent}`)].join(
        ", ",
      ),
    );
  };
  const go = (value) => {
    step = value;
    if (!Number.isNaN(value)) slider.value = value;
    read();
  };
  const draw = () => {
    const hidden = new Set(state.get("hidden"));
    drawn = data.plots.map((plot) => ({
      plot,
      ...linePlot({ ...plot, lines: plot.lines.filter((line) => !hidden.has(line.name)) }),
    }));
    plots.replaceChildren(...drawn.map(({ node }) => node));
    [...bar.querySelectorAll("button")].forEach((b, i) =>
      b.setAttribute("aria-pressed", !hidden.has(data.runs[i])),
    );
    read();
  };
  for (const name of several ? data.runs : []) {
    const button = put(make("button", "opd-button"), { type: "button" });
    button.append(make("span", `opd-lp-key opd-l-${data.hues[name]}`, name));
    button.addEventListener("click", () => {
      const hidden = state.get("hidden");
      state.set(
        "hidden",
        hidden.includes(name) ? hidden.filter((n) => n !== name) : [...hidden, name],
      );
    });
    bar.append(button);
  }
  bar.append(slider, at);
  slider.addEventListener("input", () => go(Number(slider.value)));
  plots.addEventListener("pointermove", ({ target, clientX }) => {
    const area = target.closest?.(".opd-lp-area")?.getBoundingClientRect();
    if (area?.width)
      go(Math.round(first + (last - first) * clamp((clientX - area.left) / area.width, 0, 1)));
  });
  plots.addEventListener("pointerleave", () => go(NaN));

  const alarms = make("ol", "opd-alarms");
  for (const [i, run, at_, signature, sentence, remedy] of data.alarms) {
    const line = make("li");
    line.append(
      make("b", "", i),
      make("span", "opd-sign", `${several ? `${run}, ` : ""}step ${at_}, ${signature}: `),
      `${sentence} `,
      make("span", "opd-soft", remedy),
    );
    alarms.append(line);
  }
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    said,
    ...(data.plots.length ? [bar, plots] : []),
  );
  if (data.alarms.length) box.append(alarms);
  slider.value = last;
  state.on("hidden", draw);
  draw();
});
