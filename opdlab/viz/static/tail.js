// TailAudit: curves against k, a slider for k, and at each token what its top k cover and miss.

import { clamp, define, drawLegend, make, moveCursor, number, put, wordOf } from "./core.js";
import { linePlot } from "./lines.js";
import { channelButtons, peaksIn, tokenStrip } from "./strip.js";

define("tail", ({ box, data, state }) => {
  const { text, ks, curve, by, against } = data;
  const size = text.index.length;
  const plots = data.plots.map(linePlot);
  const pictures = make("div", "opd-tail-plots");
  const step = () => Math.max(0, ks.indexOf(state.get("k")));
  const part = (values) => values.subarray(step() * size, (step() + 1) * size);
  const channels = () => [
    {
      key: "missed",
      label: "missed KL",
      unit: "nats",
      kind: "amount",
      less: "read whole",
      more: "not seen",
      limit: data.limit,
      values: part(data.missed),
      names: [],
    },
    {
      key: "uncovered",
      label: "uncovered mass",
      unit: "%",
      kind: "amount",
      less: "all covered",
      more: "half or more not",
      limit: 50,
      names: [],
      values: Float32Array.from(
        part(data.student),
        (v, i) => 100 - Math.min(v, part(data.rival)[i]),
      ),
    },
  ];
  let drawn = channels();
  const here = () => drawn.find((c) => c.key === state.get("channel")) ?? drawn[0];

  const bar = make("div", "opd-bar");
  const legend = make("div");
  const label = make("label", "opd-tail-k");
  const out = make("output");
  const told = put(make("div", "opd-tail-told"), { role: "status" });
  const slider = put(make("input"), {
    type: "range",
    min: "0",
    max: String(ks.length - 1),
    step: "1",
    "aria-label": "k, how many tokens are scored",
  });
  slider.addEventListener("input", () => state.set("k", ks[Number(slider.value)]));
  label.append("top k", slider, out);
  const buttons = channelButtons(drawn, (i) => state.set("channel", drawn[i].key));
  const badge = make("div", "opd-tail-badge");
  const chrome = make("div", "opd-bar");
  chrome.append(buttons.node, legend);
  bar.append(label, told);
  plots.forEach((plot, k) => {
    const keys = make("div", "opd-tail-keys");
    keys.append(
      ...data.plots[k].lines.map((line) =>
        make("span", `opd-lp-key opd-l-${line.look} opd-l-${line.kind}`, line.name),
      ),
    );
    plot.node.append(keys);
    pictures.append(plot.node);
  });

  const keys = ({ key }) => {
    const move = { "[": -1, "]": 1 }[key];
    const digit = Number(key) - 1;
    if (drawn[digit]) return (state.set("channel", drawn[digit].key), true);
    if (!move) return false;
    state.set("k", ks[clamp(step() + move, 0, ks.length - 1)]);
    return true;
  };
  const strip = tokenStrip({ text, finish: data.finish, state, keys });
  strip.node.classList.toggle("opd-tall", size > 400);

  const whole = (share) => `${number(share)} %`;
  const look = (row) => {
    if (row < 0 || row >= size) return;
    const read = data.exact[row] - part(data.missed)[row];
    const cover = make(
      "b",
      "opd-tail-cover",
      `top-${state.get("k")} covers ${whole(part(data.student)[row])}`,
    );
    badge.replaceChildren(
      make("span", "opd-word", wordOf(text, text.index[row])),
      make("span", "opd-soft", `position ${row - (text.texts[0]?.first ?? 0)}`),
      cover,
      make("span", "", `of student, ${whole(part(data.rival)[row])} of ${against}`),
      make("span", "", `reads ${number(read)} of ${number(data.exact[row])} nats`),
    );
    moveCursor(legend, here(), here().values[row]);
  };
  const redo = () => {
    drawn = channels();
    const k = state.get("k");
    const at = curve.k.indexOf(k);
    slider.value = String(step());
    out.textContent = String(k);
    for (const plot of plots) plot.mark(k);
    told.textContent =
      at < 0
        ? ""
        : `The ${by}'s top ${k} cover ${whole(100 * curve.student_mass[at])} of the student, ${whole(100 * curve.rival_mass[at])} of ${against}, and read ${number(curve.bucket[at])} of ${number(curve.exact[at])} nats (${whole(100 * curve.read[at])}).`;
    buttons.press(drawn.indexOf(here()));
    strip.paint({ ...here(), peaks: peaksIn(here(), 0, size) });
    drawLegend(legend, here());
    look(state.get("hovered") < 0 ? state.get("selected") : state.get("hovered"));
  };

  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    bar,
    pictures,
    chrome,
    strip.node,
    badge,
  );
  if (size && state.get("selected") < 0) state.set("selected", 0);
  state.on("k", redo);
  state.on("channel", redo);
  state.on("selected", look);
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  redo();
});
