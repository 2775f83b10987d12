// Timeline: sums along the tokens, a line for each rollout, the fork of each, and under them the tokens of the one looked at.
// Of many rollouts each has a plot of its own for the log ratio.

import { clamp, define, drawLegend, kindsAt, make, moveCursor, number, put, wordOf } from "./core.js";
import { linePlot, partOf } from "./lines.js";
import { peaksIn, tokenStrip } from "./strip.js";

define("timeline", ({ box, data, state }) => {
  const { text, paths, looks, rewards } = data;
  const { texts } = text;
  const many = data.own.length > 0;
  const plots = [
    ...data.own.map((plot, k) => [plot, [k]]),
    ...data.plots.map((plot) => [plot, [...texts.keys()]]),
  ].map(([plot, shown]) => ({ plot, shown, drawn: linePlot(plot) }));
  const longest = plots[0].plot.x[1];
  const pictures = make("div", "opd-timeline");
  const own = make("div", "opd-timeline-own");
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const channel = {
    key: "log_ratio",
    label: "log ratio",
    unit: "nats",
    kind: "ratio",
    less: "student over-confident",
    more: `${data.against} prefers`,
    limit: data.limit,
    values: paths.log_ratio,
    peaks: [],
    names: [],
  };
  const textOf = (row) => texts.findIndex(({ first, size }) => row >= first && row < first + size);
  const nameOfText = (k) => `rollout ${texts[k].sample}`;

  // A plot's own marks: line of the threshold, fork of each rollout, band of the brush.
  const marks = plots.map(({ drawn, shown }) => {
    const layer = make("div", "opd-timeline-layer");
    const line = make("div", "opd-timeline-threshold");
    const band = make("div", "opd-timeline-band");
    const dot = make("div", "opd-timeline-dot");
    layer.append(band, line);
    drawn.canvas.append(layer);
    return {
      layer,
      line,
      band,
      dot,
      forks: shown.map((k) => [
        k,
        layer.insertBefore(make("div", "opd-timeline-fork"), layer.appendChild(dot)),
      ]),
    };
  });
  const forkOf = ({ first, size }) => {
    for (let i = first; i < first + size; i++)
      if (paths.cumulative_log_ratio[i] <= -state.get("threshold")) return i;
    return -1;
  };
  const place = (node, row, { plot }) =>
    Object.assign(node.style, {
      left: `${partOf(row - texts[textOf(row)].first, plot.x)}%`,
      top: `${100 - partOf(paths[plot.key][row], plot.y)}%`,
    });

  // The list of rollouts: look of the line, reward, length, fork.
  const list = put(make("div", "opd-timeline-list"), { role: "group", "aria-label": "Rollouts" });
  const entries = texts.map((one, k) => {
    const button = put(make("button", "opd-button"), { type: "button" });
    const fork = make("span", "opd-soft");
    button.append(make("span", `opd-lp-key opd-l-${looks[k]}`, nameOfText(k)));
    if (rewards) button.append(make("span", "", `reward ${number(rewards[k])}`));
    button.append(make("span", "opd-soft", `${one.size} tokens`), fork);
    button.addEventListener("click", () => state.set("selected", Math.max(one.first, forkOf(one))));
    list.append(button);
    return { button, fork };
  });

  const field = put(make("input", "opd-field"), {
    type: "number",
    min: "0",
    step: "0.5",
    "aria-label": "Threshold of a fork, in nats",
  });
  const bar = make("div", "opd-bar");
  const label = make("label", "opd-soft");
  const legend = make("div");
  const strips = new Map();
  const held = make("div", "opd-timeline-text");
  const told = make("div", "opd-timeline-told");
  field.addEventListener(
    "change",
    () =>
      Number(field.value) >= 0 && field.value !== "" && state.set("threshold", Number(field.value)),
  );
  label.append("fork beyond ", field, " nats");
  bar.append(label, legend);

  const refork = () => {
    field.value = String(state.get("threshold"));
    marks.forEach(({ line, forks }, m) => {
      const { plot } = plots[m];
      line.hidden = plot.key !== "cumulative_log_ratio";
      line.style.top = `${100 - partOf(-state.get("threshold"), plot.y)}%`;
      for (const [k, fork] of forks) {
        const row = forkOf(texts[k]);
        fork.hidden = row < 0;
        if (row >= 0) place(fork, row, plots[m]);
      }
    });
    texts.forEach((one, k) => {
      const row = forkOf(one);
      entries[k].fork.textContent =
        row < 0 ? "no fork" : `fork at ${row - one.first} ${wordOf(text, text.index[row])}`;
    });
  };
  const look = (row) => {
    const k = textOf(row);
    if (k < 0) return;
    const at = row - texts[k].first;
    marks.forEach(({ dot }, m) => {
      dot.hidden = !plots[m].shown.includes(k);
      if (!dot.hidden) place(dot, row, plots[m]);
    });
    for (const { drawn, shown } of plots) drawn.mark(shown.includes(k) ? at : NaN);
    const said = [
      ["log ratio", paths.log_ratio[row]],
      ["log ratio so far", paths.cumulative_log_ratio[row]],
      ...(paths.kl ? [["KL so far", paths.cumulative_kl[row]]] : []),
    ];
    told.replaceChildren(
      make("b", "", nameOfText(k)),
      make("span", "opd-word", wordOf(text, text.index[row])),
      make("span", "opd-soft", `position ${at}`),
      ...said.map(([name, value]) =>
        make("span", "", `${name} ${number(value, name !== "KL so far")}`),
      ),
      ...kindsAt(data.kinds, row),
    );
    moveCursor(legend, channel, paths.log_ratio[row]);
  };
  const open = (row) => {
    const k = textOf(row);
    if (k < 0) return;
    if (!strips.has(k)) {
      const strip = tokenStrip({
        text,
        first: texts[k].first,
        size: texts[k].size,
        finish: texts[k].finish,
        state,
        label: `Tokens of ${nameOfText(k)}`,
      });
      strip.node.classList.toggle("opd-tall", texts[k].size > 400);
      strip.paint({ ...channel, peaks: peaksIn(channel, texts[k].first, texts[k].size) });
      strips.set(k, strip);
    }
    if (held.firstChild !== strips.get(k).node) held.replaceChildren(strips.get(k).node);
    entries.forEach(({ button }, j) => button.setAttribute("aria-pressed", j === k));
    for (const { drawn, shown } of plots) {
      drawn.canvas
        .querySelectorAll(".opd-l")
        .forEach((line, j) => line.classList.toggle("opd-timeline-on", shown[j] === k));
      drawn.canvas.tabIndex = shown.includes(k) ? 0 : -1; // Tab goes to one of many plots, up and down to the others
    }
  };
  const band = ([from, to = from]) => {
    const k = from === undefined ? -1 : textOf(from);
    marks.forEach((mark, m) => {
      mark.band.hidden = !plots[m].shown.includes(k);
      if (mark.band.hidden) return;
      const [a, b] = [from, to]
        .map((row) => partOf(row - texts[k].first, plots[m].plot.x))
        .sort((x, y) => x - y);
      Object.assign(mark.band.style, { left: `${a}%`, width: `${b - a}%` });
    });
  };

  // The pointer takes the line nearest to it; a drag brushes along that line.
  const rowAt = (event, m, kept = -1) => {
    const { plot, drawn, shown } = plots[m];
    const area = drawn.canvas.getBoundingClientRect();
    const at = Math.round(clamp((event.clientX - area.left) / area.width, 0, 1) * longest);
    const y = 100 * clamp((event.clientY - area.top) / area.height, 0, 1);
    const all = shown.map((k) => [k, texts[k].first + clamp(at, 0, texts[k].size - 1)]);
    const inside = all.filter(([k]) => (kept < 0 ? at < texts[k].size : k === kept));
    const gap = ([, row]) => Math.abs(100 - partOf(paths[plot.key][row], plot.y) - y);
    return (inside.length ? inside : all).reduce((a, b) => (gap(b) < gap(a) ? b : a))[1];
  };
  plots.forEach(({ drawn, plot }, m) => {
    const area = drawn.canvas;
    let from = -1;
    let dragged = false;
    put(area, {
      role: "slider",
      tabindex: "0",
      "aria-label": `Position, ${plot.label}`,
      "aria-valuemin": "0",
      "aria-valuemax": String(longest),
    });
    area.addEventListener("pointermove", (event) => {
      const row = rowAt(event, m, from < 0 ? -1 : textOf(from));
      if (from >= 0 && row !== from)
        [dragged] = [true, state.set("brush", [Math.min(from, row), Math.max(from, row)])];
      state.set("hovered", row);
    });
    area.addEventListener("pointerleave", () => state.set("hovered", -1));
    area.addEventListener(
      "pointerdown",
      (event) => (
        area.setPointerCapture(event.pointerId),
        ([from, dragged] = [rowAt(event, m), false])
      ),
    );
    area.addEventListener("pointerup", () => {
      if (from >= 0 && !dragged) (state.set("brush", []), state.set("selected", from));
      from = -1;
    });
    area.addEventListener("keydown", (event) => {
      const row = Math.max(0, state.get("selected"));
      const k = Math.max(0, textOf(row));
      const at = row - texts[k].first;
      const other = (step) => {
        const t = texts[(k + step + texts.length) % texts.length];
        return t.first + Math.min(at, t.size - 1);
      };
      const to = {
        ArrowRight: texts[k].first + Math.min(at + 1, texts[k].size - 1),
        ArrowLeft: texts[k].first + Math.max(at - 1, 0),
        Home: texts[k].first,
        End: texts[k].first + texts[k].size - 1,
        ArrowDown: other(1),
        ArrowUp: other(-1),
      }[event.key];
      if (event.key === "Escape") state.set("brush", []);
      if (to === undefined) return;
      event.preventDefault();
      state.set("selected", to);
      plots
        .find((other) => other.plot.key === plot.key && other.shown.includes(textOf(to)))
        .drawn.canvas.focus();
    });
    if (m < data.own.length) drawn.node.firstChild.replaceChildren(entries[m].button);
    (m < data.own.length ? own : pictures).append(drawn.node);
  });
  const choose = (row) => {
    open(row);
    look(row);
    const k = textOf(row);
    if (k < 0) return;
    const words = `${nameOfText(k)}, position ${row - texts[k].first}, ${wordOf(text, text.index[row])}, log ratio so far ${number(paths.cumulative_log_ratio[row], true)}`;
    for (const { drawn } of plots)
      put(drawn.canvas, { "aria-valuenow": String(row - texts[k].first), "aria-valuetext": words });
    spoken.textContent = words;
  };

  drawLegend(legend, channel);
  box.append(...(data.title ? [make("div", "opd-title", data.title)] : []));
  if (texts.length) box.append(put(make("div", "opd-prompt", texts[0].prompt), { dir: "auto" }));
  if (many) {
    const head = make("div", "opd-timeline-head");
    head.append(
      make("b", "", data.head[0]),
      " ",
      make("span", "opd-soft", `${data.head[1]}; orange: the threshold`),
    );
    pictures.prepend(head, own);
  }
  box.append(bar, ...(many ? [] : [list]), pictures, told, held, spoken);
  if (!texts.length) return void held.append(make("span", "opd-soft", "(no tokens)"));
  if (state.get("selected") < 0) state.set("selected", texts[0].first);
  state.on("threshold", refork);
  state.on("brush", band);
  state.on("selected", choose);
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  refork();
  band(state.get("brush"));
  choose(state.get("selected"));
});
