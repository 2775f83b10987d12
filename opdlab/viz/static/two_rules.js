// TwoRules: two rules, each a number with a threshold to drag or a name, on the tokens of one strip.

/** @import { Axis, Channel, Rule, RulesPayload, State } from "./types.js" */

import {
  clamp,
  css,
  define,
  drawLegend,
  isModified,
  KIND_HUES,
  liveRegion,
  make,
  makeBar,
  makeButton,
  number,
  percent,
  promptBox,
  put,
  sum,
  titleOf,
  watchWidth,
  wordAt,
} from "./core.js";
import { mapOfLong } from "./minimap.js";
import { scaleOf } from "./regimes_model.js";
import { tokenStrip } from "./strip.js";

const SETS = ["neither", "only A", "only B", "both"];
const BINS = 60;
const HIGH = 48; // of the histogram, in pixels

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return which rows a rule touches, 1 or 0 each; a missing number is not touched.
 * @param {Pick<RulesPayload, "axes" | "kinds">} data
 * @param {Rule} rule
 */
export const rowsOfRule = ({ axes, kinds }, { key, sign, value }) => {
  const kind = kinds.find((one) => one.key === key);
  if (kind) {
    const wanted = kind.names.indexOf(String(value));
    return Uint8Array.from(kind.values, (one) => Number(one === wanted && wanted >= 0));
  }
  const { values } = axes.find((one) => one.key === key) ?? axes[0];
  const limit = Number(value);
  return Uint8Array.from(values, (one) => Number(sign === ">=" ? one >= limit : one <= limit));
};

/**
 * Return the set of every row: 0 neither, 1 only A, 2 only B, 3 both.
 * @param {Uint8Array} a
 * @param {Uint8Array} b
 */
export const setsOf = (a, b) => a.map((one, row) => one + 2 * b[row]);

/**
 * Return for each set its tokens in a range of rows, all its tokens, and its share of every amount.
 * @param {Uint8Array} sets
 * @param {Pick<RulesPayload, "own" | "first" | "size" | "amounts">} data
 */
export const setTable = (sets, { own, first, size, amounts }) => {
  const columns = Object.values(amounts);
  const totals = columns.map((values) => sum([...values].filter((_, row) => own[row])));
  const table = SETS.map(() => ({ here: 0, all: 0, shares: columns.map(() => 0) }));
  sets.forEach((set, row) => {
    if (!own[row]) return;
    const entry = table[set];
    entry.all += 1;
    entry.here += Number(row >= first && row < first + size);
    columns.forEach((values, k) => {
      entry.shares[k] += totals[k] ? values[row] / totals[k] : 0;
    });
  });
  return table;
};

/**
 * Return the next row, going round, that one rule touches and the other does not.
 * @param {Uint8Array} sets
 * @param {number} first
 * @param {number} size
 * @param {number} from
 * @param {number} step 1 or -1
 */
export const nextApart = (sets, first, size, from, step) => {
  for (let k = 1; k <= size; k++) {
    const row = first + ((from - first + step * k + size * size) % size);
    if (sets[row] === 1 || sets[row] === 2) return row;
  }
  return from;
};

// ── A rule: choosers, histogram and handle ───────────────────────────────────────────────────────

/** @param {string[][]} options value and name of each @param {string} label */
const selectOf = (options, label) => {
  const node = put(make("select"), { "aria-label": label });
  for (const [value, name] of options) node.append(put(make("option", "", name), { value }));
  return node;
};

/**
 * Draw how many tokens lie where; those that the rule touches in its colour.
 * @param {HTMLCanvasElement} canvas
 * @param {Axis} axis
 * @param {Uint8Array} touched
 * @param {number[]} hue
 */
const drawHistogram = (canvas, axis, touched, hue) => {
  const width = canvas.clientWidth;
  const pen = canvas.getContext("2d");
  if (!width || !pen) return;
  const ratio = globalThis.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = HIGH * ratio;
  pen.scale(ratio, ratio);
  const scale = scaleOf(axis);
  const counts = [new Float64Array(BINS), new Float64Array(BINS)];
  axis.values.forEach((value, row) => {
    if (Number.isNaN(value)) return;
    counts[touched[row]][Math.min(BINS - 1, Math.floor(scale.at(value) * BINS))] += 1;
  });
  const most = Math.sqrt(Math.max(1, ...counts[0].map((count, i) => count + counts[1][i])));
  for (let i = 0; i < BINS; i++) {
    const whole = (HIGH * Math.sqrt(counts[0][i] + counts[1][i])) / most;
    const part = counts[1][i] ? (whole * counts[1][i]) / (counts[0][i] + counts[1][i]) : 0;
    const left = (i * width) / BINS;
    pen.fillStyle = css([128, 128, 128], 0.45);
    pen.fillRect(left, HIGH - whole, width / BINS - 1, whole - part);
    pen.fillStyle = css(hue);
    pen.fillRect(left, HIGH - part, width / BINS - 1, part);
  }
};

/** @param {HTMLElement} stage @param {HTMLElement} handle @param {(place: number) => void} moveTo */
const listenToDrag = (stage, handle, moveTo) => {
  const follow = (/** @type {PointerEvent} */ event) => {
    const { left, width } = stage.getBoundingClientRect();
    moveTo(clamp((event.clientX - left) / width, 0, 1));
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    stage.setPointerCapture(event.pointerId);
    handle.focus();
    follow(event);
    event.preventDefault();
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) follow(event);
  });
};

/**
 * Make the nodes of a rule's panel.
 * @param {"a" | "b"} trait
 * @param {RulesPayload} data
 */
const ruleParts = (trait, { axes, kinds }) => {
  const letter = trait.toUpperCase();
  const node = put(make("div", "opd-rule"), { role: "group", "aria-label": `Rule ${letter}` });
  const keys = [...axes, ...kinds].map(({ key, label }) => [key, label]);
  const choose = selectOf(keys, `What rule ${letter} reads`);
  const sign = makeButton("opd-sign");
  const names = selectOf([], `Name that rule ${letter} wants`);
  const value = make("span", "opd-value");
  const head = make("div", "opd-rule-head");
  const mark = make("span", `opd-kind opd-k opd-k${trait === "a" ? 0 : 1}`, letter);
  head.append(mark, choose, sign, names, value);
  const stage = make("div", "opd-stage");
  const canvas = make("canvas");
  const handle = put(make("div", "opd-handle"), {
    role: "slider",
    tabindex: "0",
    "aria-label": `Threshold of rule ${letter}`,
  });
  const ends = make("div", "opd-ends");
  stage.append(canvas, ends, handle);
  node.append(head, stage);
  return { node, choose, sign, names, value, stage, canvas, handle, ends };
};

/** @typedef {ReturnType<typeof ruleParts>} RuleParts */

/**
 * Let a rule follow its choosers, its line and its keys.
 * @param {RuleParts} parts
 * @param {"a" | "b"} trait
 * @param {RulesPayload} data
 * @param {State} state
 */
const listenToRule = ({ choose, sign, names, stage, handle }, trait, { axes, kinds }, state) => {
  const rule = () => state.get(trait);
  const axisOf = () => axes.find(({ key }) => key === rule().key);
  const set = (/** @type {Partial<Rule>} */ change) => state.set(trait, { ...rule(), ...change });
  const moveTo = (/** @type {number} */ place) => {
    const axis = axisOf();
    // Three digits, as the page tells them, so that a reader can type the rule.
    if (axis)
      set({
        value: Number(
          scaleOf(axis)
            .of(clamp(place, 0, 1))
            .toPrecision(3),
        ),
      });
  };
  choose.addEventListener("change", () => {
    const axis = axes.find(({ key }) => key === choose.value);
    const kind = kinds.find(({ key }) => key === choose.value);
    if (axis) set({ key: axis.key, sign: ">=", value: axis.start });
    else if (kind) set({ key: kind.key, sign: "=", value: kind.names[0] });
  });
  sign.addEventListener("click", () => set({ sign: rule().sign === ">=" ? "<=" : ">=" }));
  names.addEventListener("change", () => set({ value: names.value }));
  listenToDrag(stage, handle, moveTo);
  handle.addEventListener("keydown", (event) => {
    const axis = axisOf();
    if (!axis || isModified(event)) return;
    const step = event.shiftKey ? 0.1 : 0.01;
    const at = scaleOf(axis).at(Number(rule().value));
    /** @type {Record<string, number>} */
    const places = { ArrowRight: at + step, ArrowUp: at + step, End: 1, Home: 0 };
    Object.assign(places, { ArrowLeft: at - step, ArrowDown: at - step });
    if (!(event.key in places)) return;
    event.preventDefault();
    moveTo(places[event.key]);
  });
};

/**
 * @param {"a" | "b"} trait
 * @param {RulesPayload} data
 * @param {State} state
 */
const rulePanel = (trait, data, state) => {
  const parts = ruleParts(trait, data);
  listenToRule(parts, trait, data, state);
  const { choose, sign, names, value, stage, canvas, handle, ends } = parts;
  /** @param {Rule} now */
  const showNames = (now) => {
    const kind = data.kinds.find(({ key }) => key === now.key);
    const options = (kind?.names ?? []).map((name) =>
      put(make("option", "", name), { value: name }),
    );
    names.replaceChildren(...options);
    names.value = String(now.value);
    value.textContent = "";
  };
  /** @param {Rule} now @param {Axis} axis */
  const showLine = (now, axis) => {
    const words = now.sign === ">=" ? "at least" : "at most";
    sign.textContent = words;
    value.textContent = `${number(Number(now.value))} ${axis.unit}`.trim();
    handle.style.left = `${100 * scaleOf(axis).at(Number(now.value))}%`;
    put(handle, {
      "aria-valuemin": axis.ends[0],
      "aria-valuemax": axis.ends[1],
      "aria-valuenow": now.value,
      "aria-valuetext": `${axis.label} ${words} ${value.textContent}`,
    });
    ends.replaceChildren(...axis.ends.map((end) => make("span", "", number(end))));
  };
  /** @param {Uint8Array} touched */
  const show = (touched) => {
    const now = state.get(trait);
    const axis = data.axes.find(({ key }) => key === now.key);
    choose.value = now.key;
    sign.hidden = !axis;
    stage.hidden = !axis;
    names.hidden = Boolean(axis);
    if (!axis) {
      showNames(now);
      return;
    }
    showLine(now, axis);
    drawHistogram(canvas, axis, touched, KIND_HUES[trait === "a" ? 0 : 1]);
  };
  return { node: parts.node, show };
};

// ── The table of sets ────────────────────────────────────────────────────────────────────────────

/** @param {RulesPayload} data */
const setRows = ({ amounts, size, text }) => {
  const node = make("div", "opd-sets");
  const keys = Object.keys(amounts);
  node.style.setProperty("--amounts", String(keys.length));
  const isWhole = size === text.index.length;
  const head = make("div", "opd-set opd-soft");
  const titles = ["set", isWhole ? "" : "here", isWhole ? "tokens" : "in all"];
  titles.forEach((words, i) => head.append(make("span", i ? "opd-value" : "", words)));
  for (const key of keys) head.append(make("span", "", `of ${key === "kl" ? "KL" : key}`));
  node.append(head);
  const lines = SETS.map((name, set) => {
    const line = put(make("div", "opd-set"), { "data-set": name });
    const label = make("span", "opd-item");
    if (set)
      label.append(make("span", `opd-kind opd-k opd-k${set - 1}`, ["A", "B", "AB"][set - 1]));
    label.append(make("span", "", name));
    const here = make("span", "opd-value");
    const all = make("span", "opd-value");
    const shares = keys.map(() => {
      const cell = make("span", "opd-share");
      const track = make("span", "opd-track");
      const fill = track.appendChild(make("span", "opd-fill"));
      const value = make("span", "opd-value");
      cell.append(track, value);
      return { cell, fill, value };
    });
    line.append(label, here, all, ...shares.map(({ cell }) => cell));
    node.append(line);
    return { here, all, shares };
  });
  /** @param {ReturnType<typeof setTable>} table */
  const show = (table) => {
    lines.forEach(({ here, all, shares }, set) => {
      here.textContent = isWhole ? "" : String(table[set].here);
      all.textContent = String(table[set].all);
      shares.forEach(({ fill, value }, k) => {
        const share = table[set].shares[k];
        fill.style.width = `${100 * clamp(share, 0, 1)}%`;
        value.textContent = percent(share);
      });
    });
  };
  return { node, show };
};

/** @param {Uint8Array} sets @returns {Channel} */
const channelOfSets = (sets) => ({
  key: "set",
  label: "rules",
  unit: "",
  kind: "category",
  less: "",
  more: "",
  limit: 2,
  names: SETS.slice(1),
  marks: ["A", "B", "AB"],
  hues: [],
  values: Float32Array.from(sets, (set) => set - 1),
  peaks: [],
});

define("rules", ({ box, data, state }) => {
  const { text, first, size, finish } = data;
  let sets = new Uint8Array(text.index.length);
  /** @param {KeyboardEvent} event */
  const keys = ({ key }) => {
    if (key !== "d" && key !== "D") return false;
    const from = state.get("selected");
    state.set("selected", nextApart(sets, first, size, from, key === "d" ? 1 : -1));
    return true;
  };
  const strip = tokenStrip({ text, first, size, finish, state, keys });
  const map = mapOfLong(strip, []);
  const panels = { a: rulePanel("a", data, state), b: rulePanel("b", data, state) };
  const both = make("div", "opd-both");
  both.append(panels.a.node, panels.b.node);
  const table = setRows(data);
  const legend = make("div");
  const spoken = liveRegion();
  const hint = make("span", "opd-soft", "drag the lines; d and D: next token of only one rule");
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(hint, legend), both);
  box.append(...(map ? [map.node] : []), strip.node, table.node, spoken);

  const redraw = () => {
    const touched = { a: rowsOfRule(data, state.get("a")), b: rowsOfRule(data, state.get("b")) };
    sets = setsOf(touched.a, touched.b);
    const channel = channelOfSets(sets);
    panels.a.show(touched.a);
    panels.b.show(touched.b);
    strip.paint(channel);
    drawLegend(legend, channel);
    table.show(setTable(sets, data));
    map?.draw([channel], { peaks: [], found: [], chosen: state.get("selected") });
  };
  state.on("a", redraw);
  state.on("b", redraw);
  state.on("selected", (row) => {
    map?.mark(row);
    if (row >= 0) spoken.textContent = `${wordAt(text, row)}, ${SETS[sets[row]]}`;
  });
  redraw();
  let drawn = 0;
  const unwatch = watchWidth(
    both,
    () => drawn,
    () => {
      drawn = both.clientWidth;
      redraw();
    },
  );
  return () => {
    unwatch();
    map?.close();
  };
});
