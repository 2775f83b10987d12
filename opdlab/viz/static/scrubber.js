// Scrubber: a slider over the kept steps of a run. All steps are here, so moving repaints and asks
// nobody.

/** @import { Channel, Difference, Fate, ScrubberPayload, State } from "./types.js" */
/** @import { DrawnPlot } from "./lines.js" */
/** @import { Strip } from "./strip.js" */

import {
  clamp,
  define,
  drawLegend,
  kindsAt,
  liveRegion,
  make,
  makeBar,
  makeButton,
  moveCursor,
  number,
  promptBox,
  put,
  titleOf,
  wordAt,
} from "./core.js";
import { linePlot, valueAt } from "./lines.js";
import { channelButtons, tokenStrip } from "./strip.js";

const FRAME = 600; // ms per step while playing
const WHOLE = 255; // the page knows probabilities in 255ths

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return values of a step as their change since the first. Where `near` is set, a change towards 0
 * is positive, whatever the sign.
 * @param {Float32Array} values of one step or of several
 * @param {Float32Array} since values of the first step
 * @param {boolean} near
 */
export const changeSince = (values, since, near) =>
  values.map((value, i) => {
    const before = since[i % since.length];
    return near ? Math.abs(before) - Math.abs(value) : value - before;
  });

/** @param {number} share as fine as the page knows it */
const coarsePercent = (share) => {
  if (share === 0) return "<0.2 %";
  if (share === 1) return ">99.8 %";
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
};

/**
 * What the state says of this payload: places are indices into `steps`.
 * @param {ScrubberPayload} data
 * @param {State} state
 */
const modelOf = ({ steps, text, channels, probe, sizes }, state) => {
  const rows = text.index.length;
  const starts = sizes.map((_, k) => {
    const before = sizes.slice(0, k).reduce((a, b) => a + b, 0);
    return probe ? 0 : before;
  });
  const place = () => Math.max(0, steps.indexOf(state.get("step")));
  const channelIndex = () =>
    Math.max(
      0,
      channels.findIndex(({ key }) => key === state.get("channel")),
    );
  const isChange = () => probe && state.get("delta");
  /**
   * Return the channel at a step as the strip takes it; `isWhole` with the values of all steps, for
   * a legend that stays.
   * @param {number} k
   * @returns {Channel}
   */
  const channelAt = (k, isWhole = false) => {
    const channel = channels[channelIndex()];
    const { values, delta } = channel;
    if (!probe) return { ...channel, peaks: channel.peaks[k] };
    const shown = isWhole ? values : values.subarray(k * rows, (k + 1) * rows);
    if (!isChange()) return { ...channel, values: shown, peaks: channel.peaks[k] };
    return {
      ...channel,
      label: `Δ ${channel.label}`,
      kind: delta.kind,
      limit: delta.limit,
      less: delta.less,
      more: delta.more,
      peaks: delta.peaks[k],
      values: changeSince(shown, values.subarray(0, rows), delta.near),
    };
  };
  return {
    starts,
    place,
    channelIndex,
    isChange,
    channelAt,
    /** @param {number} k */
    go: (k) => state.set("step", steps[clamp(k, 0, steps.length - 1)]),
    /** @param {number} row */
    isShown: (row) => row >= starts[place()] && row < starts[place()] + sizes[place()],
  };
};

/** @typedef {ReturnType<typeof modelOf>} Model */

// ── Above the strip: slider, play, switch, small curves ──────────────────────────────────────────

/** @param {ScrubberPayload} data @param {Model} model */
const player = ({ steps }, model) => {
  const node = makeButton("", "▶ play");
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    node.textContent = "▶ play";
  };
  const advance = () => {
    if (model.place() < steps.length - 1) model.go(model.place() + 1);
    else stop();
  };
  const start = () => {
    if (model.place() === steps.length - 1) model.go(0);
    node.textContent = "❚❚ pause";
    timer = setInterval(advance, FRAME);
  };
  node.addEventListener("click", () => (timer ? stop() : start()));
  return { node, stop };
};

/**
 * @param {ScrubberPayload} data
 * @param {State} state
 * @param {Model} model
 * @param {(event: KeyboardEvent) => boolean} keys
 */
const scrubBar = (data, state, model, keys) => {
  const { steps, probe } = data;
  const count = steps.length;
  const node = make("div", "opd-scrub");
  const at = make("span", "opd-at");
  const play = player(data, model);
  const slider = put(make("input"), {
    type: "range",
    min: 0,
    max: count - 1,
    step: 1,
    "aria-label": "Step of the run",
  });
  slider.addEventListener("input", () => {
    play.stop();
    model.go(Number(slider.value));
  });
  slider.addEventListener("keydown", (event) => {
    if (event.key !== "[" && event.key !== "]") return;
    play.stop();
    keys(event);
    event.preventDefault();
  });
  const change = makeButton("", `Δ from step ${steps[0]}`);
  change.addEventListener("click", () => state.set("delta", !state.get("delta")));
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!isCalm && count > 1) node.append(play.node);
  node.append(slider, at);
  if (probe && count > 1) node.append(change);
  const show = () => {
    const k = model.place();
    slider.value = String(k);
    put(slider, { "aria-valuetext": `step ${steps[k]}` });
    at.textContent = `step ${steps[k]} of ${steps[count - 1]}`;
    put(change, { "aria-pressed": model.isChange() });
  };
  return { node, show, stop: play.stop };
};

/** @param {ScrubberPayload} data */
const factCurves = ({ facts }) => {
  const node = make("div", "opd-kpis");
  const curves = facts.map((plot) => ({ plot, ...linePlot(plot) }));
  node.append(...curves.map((curve) => curve.node));
  /** @param {number} step */
  const show = (step) => {
    for (const { plot, told, mark } of curves) {
      told.textContent = [number(valueAt(plot.lines[0], step)), plot.unit]
        .filter(Boolean)
        .join(" ");
      mark(step);
    }
  };
  const words = () =>
    curves.map(({ plot, told }) => `${plot.label} ${told.textContent}`).join(", ");
  return { node, show, words };
};

// ── The strip: one of all steps, or one per step, made when first shown ──────────────────────────

/**
 * @param {ScrubberPayload} data
 * @param {State} state
 * @param {Model} model
 * @param {(event: KeyboardEvent) => boolean} keys
 */
const stripHolder = ({ text, sizes, finish, probe }, state, model, keys) => {
  /** @type {Strip[]} */
  const strips = [];
  /** @type {HTMLElement} */
  let node = make("div");
  /** @param {Channel} channel */
  const show = (channel) => {
    const k = model.place();
    const first = model.starts[k];
    const strip = (strips[probe ? 0 : k] ??= tokenStrip({
      text,
      first,
      size: sizes[k],
      finish: finish[k],
      state,
      keys,
    }));
    if (node !== strip.node) node.replaceWith(strip.node);
    node = strip.node;
    strip.paint(channel);
  };
  return { node: () => node, show };
};

// ── Below the strip: the path of one token, or the words that changed ────────────────────────────

/**
 * Return the policies whose probabilities are known, each with the look of its line.
 * @param {Fate} fate
 */
const policiesOf = ({ rival }) => [
  { name: "student", look: "student" },
  ...(rival ? [{ name: rival, look: "teacher" }] : []),
];

/**
 * Make the panel of one token: its probability at all steps, and what each policy wants most.
 * @param {ScrubberPayload} data
 * @param {Fate} fate
 */
const fatePanel = ({ text, steps, kinds }, fate) => {
  const node = make("div", "opd-panel opd-fate");
  const rows = text.index.length;
  const policies = policiesOf(fate);
  /** @param {number} row */
  const pathOf = (row) => {
    const lines = policies.map(({ name, look }) => {
      const shares = steps.map((_, k) => fate.p[name][k * rows + row] / WHOLE);
      return { name, look, kind: "line", x: steps, y: shares };
    });
    const most = Math.max(...lines.flatMap(({ y }) => y));
    const top = [0.1, 0.25, 0.5].find((one) => most <= one) ?? 1;
    return linePlot({
      label: wordAt(text, row),
      told: `probability at position ${row}`,
      x: [steps[0], steps[steps.length - 1]],
      y: [0, top],
      marks: [],
      lines: lines.reverse(), // the student's is drawn last, over the other
    });
  };
  /** @param {number} row @param {number} k */
  const wishes = (row, k) => {
    const holder = make("div", "opd-wish");
    for (const { name, look } of policies) {
      const line = make("div");
      const share = fate.p[name][k * rows + row] / WHOLE;
      line.append(make("span", `opd-lp-key opd-l-${look}`, name));
      line.append(make("span", "opd-value", coarsePercent(share)));
      if (fate.wanted) {
        const word = fate.wanted.names[fate.wanted.at[name][k * rows + row]];
        line.append(make("span", "opd-soft", "wants most"), make("span", "opd-name-of", word));
      }
      holder.append(line);
    }
    return holder;
  };
  let shownRow = -1;
  /** @type {DrawnPlot | null} */
  let path = null;
  /** @param {number} row @param {number} k */
  const show = (row, k) => {
    if (row !== shownRow || !path) path = pathOf(row);
    shownRow = row;
    path.mark(steps[k]);
    node.replaceChildren(path.node, wishes(row, k), ...kindsAt(kinds, k * rows + row));
  };
  return { node, show };
};

// The space before a word stays out of its mark, so that no line runs through it.
/** @param {Difference} parts */
const markedWords = (parts) =>
  parts.flatMap(([kind, words]) => {
    const lead = kind === "same" ? "" : (/^\s*/.exec(words)?.[0] ?? "");
    const tags = /** @type {const} */ ({ same: "span", gone: "del", new: "ins" });
    return [lead, make(tags[kind], "", words.slice(lead.length))];
  });

/**
 * Make the panel of the words that changed, against the step before or the first.
 * @param {ScrubberPayload} data
 * @param {NonNullable<ScrubberPayload["words"]>} differences
 * @param {State} state
 */
const wordsPanel = ({ steps }, differences, state) => {
  const node = make("div", "opd-panel opd-fate");
  const head = make("div", "opd-diff-bar");
  const told = make("span", "opd-soft");
  const words = put(make("div", "opd-diff"), { dir: "auto" });
  const against = make("div", "opd-buttons");
  const choices = ["previous", "first"].map((name) => {
    const choose = makeButton("", `${name} step`);
    choose.addEventListener("click", () => state.set("against", name));
    against.append(choose);
    return { name, choose };
  });
  head.append(against, told);
  node.append(head, words);
  /** @param {Difference} parts @param {number} k @param {number} other place of the other step */
  const summary = (parts, k, other) => {
    if (!k) return "the first step";
    const isSame = parts.every(([kind]) => kind === "same");
    if (isSame) return `the same words as at step ${steps[other]}`;
    return `against step ${steps[other]}: new words underlined, gone ones struck out`;
  };
  /** @param {number} k */
  const show = (k) => {
    const isFirst = state.get("against") === "first";
    const parts = differences[isFirst ? "first" : "previous"][k];
    told.textContent = summary(parts, k, isFirst ? 0 : k - 1);
    words.replaceChildren(...markedWords(parts));
    for (const { name, choose } of choices) {
      put(choose, { "aria-pressed": isFirst === (name === "first") });
    }
  };
  return { node, show };
};

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

/** @param {ScrubberPayload} data @param {State} state */
const makeParts = (data, state) => {
  const { channels, fate, words } = data;
  const model = modelOf(data, state);
  /** @param {KeyboardEvent} event */
  const keys = ({ key }) => {
    const channel = channels[Number(key) - 1];
    if (key === "[" || key === "]") model.go(model.place() + (key === "]" ? 1 : -1));
    else if (channel) state.set("channel", channel.key);
    else return false;
    return true;
  };
  return {
    model,
    bar: scrubBar(data, state, model, keys),
    curves: factCurves(data),
    strip: stripHolder(data, state, model, keys),
    legend: make("div"),
    buttons: channelButtons(channels, (i) => state.set("channel", channels[i].key)),
    path: fate && fatePanel(data, fate),
    changes: words && wordsPanel(data, words, state),
    spoken: liveRegion(),
  };
};

define("scrubber", ({ box, data, state }) => {
  const { steps } = data;
  const parts = makeParts(data, state);
  const { model, bar, curves, strip, legend, buttons, path, changes, spoken } = parts;
  /** @param {number} row */
  const showToken = (row) => {
    const k = model.place();
    const channel = model.channelAt(k);
    moveCursor(legend, channel, model.isShown(row) ? channel.values[row] : NaN);
    if (model.isShown(row)) path?.show(row, k);
  };
  const showStep = () => {
    const k = model.place();
    bar.show();
    curves.show(steps[k]);
    strip.show(model.channelAt(k));
    changes?.show(k);
    showToken(state.get("selected"));
  };
  const showChannel = () => {
    buttons.press(model.channelIndex());
    drawLegend(legend, model.channelAt(model.place(), true));
    showStep();
  };

  const chrome = makeBar(buttons.node, legend);
  box.append(...titleOf(data), promptBox(data.prompt), bar.node, curves.node, chrome, strip.node());
  box.append(...[path, changes].flatMap((panel) => panel?.node ?? []), spoken);
  state.on("step", () => {
    showStep();
    spoken.textContent = `step ${steps[model.place()]}, ${curves.words()}`;
  });
  state.on("channel", showChannel);
  state.on("delta", showChannel);
  state.on("against", () => changes?.show(model.place()));
  state.on("selected", showToken);
  state.on("hovered", (row) => showToken(row < 0 ? state.get("selected") : row));
  showChannel();
  return bar.stop;
});
