// Scrubber: a slider over the kept steps of a run. All steps are here, so moving repaints and asks nobody.

import { clamp, define, drawLegend, kindsAt, make, moveCursor, number, put, wordOf } from "./core.js";
import { linePlot, valueAt } from "./lines.js";
import { channelButtons, tokenStrip } from "./strip.js";

define("scrubber", ({ box, data, state }) => {
  const { steps, text, channels, probe } = data;
  const count = steps.length;
  const rows = text.index.length;
  const legend = make("div");
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const starts = data.sizes.map((_, k) =>
    probe ? 0 : data.sizes.slice(0, k).reduce((a, b) => a + b, 0),
  );
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let timer = 0;

  const place = () => Math.max(0, steps.indexOf(state.get("step")));
  const chosen = () =>
    Math.max(
      0,
      channels.findIndex((c) => c.key === state.get("channel")),
    );
  const changing = () => probe && state.get("delta");

  // A channel at step k as the strip takes it; `whole` with the numbers of all steps, for a legend that stays.
  const channelAt = (k, whole = false) => {
    const c = channels[chosen()];
    const d = c.delta;
    const cut = (at) => c.values.subarray(at * rows, (at + 1) * rows);
    if (!probe) return { ...c, peaks: c.peaks[k] };
    if (!changing()) return { ...c, values: whole ? c.values : cut(k), peaks: c.peaks[k] };
    const since = cut(0);
    const move = d.near
      ? (v, i) => Math.abs(since[i % rows]) - Math.abs(v)
      : (v, i) => v - since[i % rows];
    return {
      ...c,
      label: `Δ ${c.label}`,
      kind: d.kind,
      limit: d.limit,
      less: d.less,
      more: d.more,
      peaks: d.peaks[k],
      values: (whole ? c.values : cut(k)).map(move),
    };
  };

  const go = (k) => state.set("step", steps[clamp(k, 0, count - 1)]);
  const keys = ({ key }) => {
    const digit = Number(key) - 1;
    if (key === "[" || key === "]") go(place() + (key === "]" ? 1 : -1));
    else if (channels[digit]) state.set("channel", channels[digit].key);
    else return false;
    return true;
  };

  // ── What stands above: slider, play, switch, small curves ──
  const slider = put(make("input"), {
    type: "range",
    min: 0,
    max: count - 1,
    step: 1,
    "aria-label": "Step of the run",
  });
  const at = make("span", "opd-at");
  const bar = make("div", "opd-scrub");
  const button = (label) => put(make("button", "opd-button", label), { type: "button" });
  const play = button("▶ play");
  const delta = button(`Δ from step ${steps[0]}`);
  const stop = () => (clearInterval(timer), (timer = 0), (play.textContent = "▶ play"));
  const start = () => {
    if (place() === count - 1) go(0);
    play.textContent = "❚❚ pause";
    timer = setInterval(() => (place() < count - 1 ? go(place() + 1) : stop()), 600);
  };
  slider.addEventListener("input", () => (stop(), go(Number(slider.value))));
  slider.addEventListener(
    "keydown",
    (event) => ["[", "]"].includes(event.key) && (stop(), keys(event), event.preventDefault()),
  );
  play.addEventListener("click", () => (timer ? stop() : start()));
  delta.addEventListener("click", () => state.set("delta", !state.get("delta")));
  bar.append(
    ...(calm || count < 2 ? [] : [play]),
    slider,
    at,
    ...(probe && count > 1 ? [delta] : []),
  );
  const facts = make("div", "opd-kpis");
  const small = data.facts.map((plot) => ({ plot, ...linePlot(plot) }));
  facts.append(...small.map(({ node }) => node));

  // ── The strip: one of all steps, or one a step, made when first shown ──
  const strips = [];
  const finish = (k) => data.finish[k];
  const stripOf = (k) =>
    (strips[probe ? 0 : k] ??= tokenStrip({
      text,
      first: starts[k],
      size: data.sizes[k],
      finish: finish(k),
      state,
      keys,
    }));
  let shown = make("div");

  // ── Below: the path of one token, or the words that changed ──
  const panel = make("div", "opd-panel opd-fate");
  const fate = data.fate;
  const pathOfToken = (row) => {
    const of = (name) => Float32Array.from(steps, (_, k) => fate.p[name][k * rows + row] / 255);
    const x = Float32Array.from(steps);
    const lines = [["student", "student"], ...(fate.rival ? [[fate.rival, "teacher"]] : [])].map(
      ([name, look]) => ({ name, look, kind: "line", x, y: of(name) }),
    );
    const most = Math.max(...lines.flatMap((line) => [...line.y]));
    const top = [0.1, 0.25, 0.5].find((t) => most <= t) ?? 1;
    return linePlot({
      label: wordOf(text, text.index[row]),
      told: `probability at position ${row}`,
      x: [steps[0], steps[count - 1]],
      y: [0, top],
      marks: [],
      lines: lines.reverse(),
    });
  };
  const coarse = (p) =>
    p === 0 ? "<0.2 %" : p === 1 ? ">99.8 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`; // as fine as the page knows it
  const wish = (row, k) => {
    const line = make("div", "opd-wish");
    for (const [name, look] of [
      ["student", "student"],
      [fate.rival, "teacher"],
    ]) {
      if (!name) continue;
      const one = line.appendChild(make("div"));
      const key = make("span", `opd-lp-key opd-l-${look}`, name);
      const p = fate.p[name][k * rows + row] / 255;
      const want = fate.wanted?.at[name][k * rows + row];
      one.append(key, make("span", "opd-value", coarse(p)));
      if (want !== undefined)
        one.append(
          make("span", "opd-soft", "wants most"),
          make("span", "opd-name-of", fate.wanted.names[want]),
        );
    }
    return line;
  };
  let shownRow = -1;
  let path = null;
  const look = (row) => {
    const k = place();
    const here = row >= starts[k] && row < starts[k] + data.sizes[k];
    const channel = channelAt(k);
    moveCursor(legend, channel, here ? channel.values[row] : NaN);
    if (!fate || !here) return;
    if (row !== shownRow) [shownRow, path] = [row, pathOfToken(row)];
    path.mark(steps[k]);
    panel.replaceChildren(path.node, wish(row, k), ...kindsAt(data.kinds, k * rows + row));
  };
  const words = make("div", "opd-diff");
  const against = make("div", "opd-buttons");
  const told = make("span", "opd-soft");
  const compare = () => {
    const k = place();
    const first = state.get("against") === "first";
    const parts = data.words[first ? "first" : "previous"][k];
    const since = k ? steps[first ? 0 : k - 1] : null;
    const moved = parts.filter(([kind]) => kind !== "same").length;
    told.textContent =
      since === null
        ? "the first step"
        : moved
          ? `against step ${since}: new words underlined, gone ones struck out`
          : `the same words as at step ${since}`;
    // The space before a word stays out of its mark, so that no line runs through it.
    words.replaceChildren(
      ...parts.flatMap(([kind, part]) => {
        const lead = kind === "same" ? "" : part.match(/^\s*/)[0];
        return [
          lead,
          make({ same: "span", gone: "del", new: "ins" }[kind], "", part.slice(lead.length)),
        ];
      }),
    );
    [...against.children].forEach((b, i) => b.setAttribute("aria-pressed", first === (i === 1)));
  };
  if (data.words) {
    for (const name of ["previous", "first"]) {
      const b = button(`${name} step`);
      b.addEventListener("click", () => state.set("against", name));
      against.append(b);
    }
    const head = make("div", "opd-diff-bar");
    head.append(against, told);
    put(words, { dir: "auto" });
    panel.append(head, words);
  }

  // ── Everything that depends on the step, the channel, the switch ──
  const show = () => {
    const k = place();
    const channel = channelAt(k);
    const strip = stripOf(k);
    slider.value = k;
    slider.setAttribute("aria-valuetext", `step ${steps[k]}`);
    at.textContent = `step ${steps[k]} of ${steps[count - 1]}`;
    for (const { plot, told: value, mark } of small) {
      value.textContent = [number(valueAt(plot.lines[0], steps[k])), plot.unit]
        .filter(Boolean)
        .join(" ");
      mark(steps[k]);
    }
    if (shown !== strip.node) (shown.replaceWith(strip.node), (shown = strip.node));
    strip.paint(channel);
    if (data.words) compare();
    look(state.get("selected"));
  };
  const recolour = () => {
    buttons.press(chosen());
    delta.setAttribute("aria-pressed", Boolean(changing()));
    drawLegend(legend, channelAt(place(), true));
    show();
  };

  const buttons = channelButtons(channels, (i) => state.set("channel", channels[i].key));
  const prompt = put(make("div", "opd-prompt", data.prompt), { dir: "auto" });
  const chrome = make("div", "opd-bar");
  chrome.append(buttons.node, legend);
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    prompt,
    bar,
    facts,
    chrome,
    shown,
    panel,
    spoken,
  );
  if (!fate && !data.words) panel.remove();
  state.on("step", () => {
    show();
    spoken.textContent = `step ${steps[place()]}, ${small.map(({ plot, told: value }) => `${plot.label} ${value.textContent}`).join(", ")}`;
  });
  state.on("channel", recolour);
  state.on("delta", recolour);
  state.on("against", () => data.words && compare());
  state.on("selected", look);
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  recolour();
  return stop;
});
