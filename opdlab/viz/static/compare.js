// Compare: a strip for each trace on one scale, the difference of two, and the numbers of all at
// one token.

/** @import { Channel, ComparedChannel, ComparePayload, Numbers, State } from "./types.js" */
/** @import { KeyHandler } from "./strip.js" */

import {
  css,
  define,
  drawLegend,
  figureOf,
  HUES,
  kindsAt,
  liveRegion,
  make,
  makeBar,
  makeButton,
  measure,
  moveCursor,
  number,
  promptBox,
  put,
  sideOf,
  sum,
  titleOf,
  twoSided,
  weightOf,
  wordAt,
} from "./core.js";
import { channelButtons, peaksIn, TALL_STRIP, tokenStrip } from "./strip.js";

const LISTED = 8; // tokens that changed most

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/** @param {ComparedChannel} channel @param {number} k @returns {Channel} */
const channelOf = (channel, k) => ({
  ...channel,
  values: channel.values[k],
  peaks: channel.peaks[k],
});

/**
 * Return the first of a pair minus the second as a channel, with a scale of its own: the size that
 * 98 % of the tokens stay below.
 * @param {ComparedChannel} channel
 * @param {string[]} names
 * @param {number[]} pair
 * @returns {Channel}
 */
export const differenceOf = (channel, names, [a, b]) => {
  const values = channel.values[a].map((value, row) => value - channel.values[b][row]);
  const differences = Float32Array.from(values);
  const sizes = [...differences]
    .map(Math.abs)
    .filter(Number.isFinite)
    .sort((x, y) => x - y);
  const most = sizes.at(-1) || 1;
  const limit = sizes[Math.min(sizes.length - 1, Math.floor(0.98 * sizes.length))] || most;
  return {
    key: "difference",
    label: "difference",
    unit: channel.unit,
    kind: "signed",
    less: `${names[b]} higher`,
    more: `${names[a]} higher`,
    limit,
    values: differences,
    peaks: peaksIn({ values: differences, limit }, 0, differences.length),
    names: [],
  };
};

/**
 * Return the rows of largest size, without those below a hundredth of the largest, and the row
 * that follows them, if any.
 * @param {Numbers} values
 */
export const mostChanged = (values) => {
  const rows = peaksIn({ values, limit: 1e-30 }, 0, values.length, LISTED);
  const sizeOf = (/** @type {number} */ row) => Math.abs(values[row]);
  const shown = rows.filter((row) => sizeOf(row) >= sizeOf(rows[0]) / 100);
  return { shown, next: rows.at(shown.length) };
};

/** @param {ComparePayload} data @param {State} state */
const readState = ({ names, channels }, state) => ({
  channel: () => channels.find(({ key }) => key === state.get("channel")) ?? channels[0],
  pair: () => {
    const pair = state.get("pair");
    return pair.every((k) => names[k] !== undefined) ? pair : [1, 0];
  },
});

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/**
 * @param {string[]} names
 * @param {string} label
 * @param {number} chosen
 * @param {(k: number) => void} choose
 */
const pickList = (names, label, chosen, choose) => {
  const node = put(make("select", "opd-pick"), { "aria-label": label });
  names.forEach((name, i) => node.append(put(make("option", "", name), { value: i })));
  node.value = String(chosen);
  node.addEventListener("change", () => choose(Number(node.value)));
  return node;
};

/**
 * Make a line per trace: name, a bar on the shared scale, the value.
 * @param {string[]} names
 */
const valueLines = (names) => {
  const node = make("div", "opd-versus-values");
  const lines = names.map((name) => {
    const line = make("div", "opd-versus-line");
    const track = make("span", "opd-versus-track");
    const fill = track.appendChild(make("span", "opd-versus-fill"));
    const figure = make("span", "opd-versus-number");
    line.append(make("span", "opd-versus-name", name), track, figure);
    node.append(line);
    return { track, fill, figure };
  });
  /** @param {{ value: number, scale: Channel | ComparedChannel }[]} shown */
  const show = (shown) =>
    shown.forEach(({ value, scale }, k) => {
      const { track, fill, figure } = lines[k];
      const share = weightOf(value, scale);
      const signed = twoSided(scale);
      track.toggleAttribute("data-signed", signed);
      fill.style.width = `${100 * (signed ? share / 2 : share)}%`;
      fill.style.left = signed ? `${value < 0 ? 50 - 50 * share : 50}%` : "0";
      fill.style.background = css(HUES[sideOf(value, scale)]);
      figure.textContent = figureOf(value, scale);
    });
  return { node, show };
};

/** @param {string[]} names */
const rhoTable = (names) => {
  const node = make("table", "opd-rho");
  const head = make("tr");
  /** @param {string} scope @param {string} words @param {string} name */
  const headCell = (scope, words, name) =>
    put(make("th", "", words), { scope, "aria-label": name, title: name });
  // Numbers as heads: names of many columns would not fit.
  head.append(make("td"), ...names.map((name, k) => headCell("col", String(k + 1), name)));
  node.append(make("caption", "", "rank correlation of sizes"), head);
  const cells = names.flatMap((name, k) => {
    const line = make("tr");
    const own = names.map(() => make("td"));
    line.append(headCell("row", `${k + 1} ${name}`, name), ...own);
    node.append(line);
    return own;
  });
  /** @param {Numbers} rho flat, row by row */
  const show = (rho) =>
    cells.forEach((cell, i) => {
      cell.textContent = number(rho[i]);
    });
  return { node, show };
};

/** @param {string} title @param {...Node} nodes */
const column = (title, ...nodes) => {
  const node = make("div", "opd-versus-column");
  node.append(make("div", "opd-versus-title opd-soft", title), ...nodes);
  return node;
};

/**
 * Make a strip per trace and the one of the difference. All scroll together: they are of one text
 * and one width.
 * @param {ComparePayload} data
 * @param {State} state
 * @param {KeyHandler} keys
 */
const makeStrips = ({ names, text }, state, keys) => {
  const [first, ...others] = [...names.map((name) => `under ${name}`), "by difference"];
  const strips = [first, ...others].map((words) => {
    const strip = tokenStrip({ text, state, keys, label: `Tokens ${words}` });
    strip.node.classList.add("opd-versus-strip");
    strip.node.classList.toggle("opd-tall", strip.size > TALL_STRIP);
    return { strip, head: make("div", "opd-versus"), told: make("span", "opd-soft") };
  });
  for (const { strip } of strips) {
    strip.node.addEventListener("scroll", () => {
      const { scrollTop } = strip.node;
      for (const other of strips) {
        if (other.strip.node.scrollTop !== scrollTop) other.strip.node.scrollTop = scrollTop;
      }
    });
  }
  names.forEach((name, k) => strips[k].head.append(make("b", "", name), strips[k].told));
  return { own: strips.slice(0, -1), last: strips[names.length], all: strips };
};

/** @param {ComparePayload} data @param {State} state */
const makeParts = (data, state) => {
  const { names, channels } = data;
  const now = readState(data, state);
  /** @type {KeyHandler} */
  const keys = ({ key }) => {
    const channel = channels[Number(key) - 1];
    if (channel) state.set("channel", channel.key);
    return Boolean(channel);
  };
  const strips = makeStrips(data, state, keys);
  const picks = ["minuend", "subtracted"].map((label, k) =>
    pickList(names, label, now.pair()[k], (to) => {
      const pair = now.pair().map((old, j) => (j === k ? to : old));
      state.set("pair", pair);
    }),
  );
  const differenceLegend = make("div");
  const { head, told } = strips.last;
  head.append(make("b", "", "difference"), picks[0], make("span", "", "−"), picks[1]);
  head.append(told, differenceLegend);
  return {
    now,
    strips,
    picks,
    differenceLegend,
    legend: make("div"),
    buttons: channelButtons(channels, (i) => state.set("channel", channels[i].key)),
    word: make("div", "opd-versus-word"),
    values: valueLines([...names, "difference"]),
    list: make("ol", "opd-changed"),
    rho: rhoTable(names),
    spoken: liveRegion(),
  };
};

/** @typedef {ReturnType<typeof makeParts>} Parts */

/** @param {HTMLElement} box @param {ComparePayload} data @param {Parts} parts */
const arrange = (box, data, { strips, buttons, legend, word, values, list, rho, spoken }) => {
  const lower = make("div", "opd-panel opd-versus-panel");
  lower.append(
    column("At the token", word, values.node),
    column("Changed most", list),
    column("Do they weigh the same tokens?", rho.node),
  );
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(buttons.node, legend));
  for (const { head, strip } of strips.all) box.append(head, strip.node);
  box.append(lower, spoken);
};

// ── Drawing, each part by what it depends on ─────────────────────────────────────────────────────

/**
 * Make the line of a token that changed: its word, by how much, from what to what.
 * @param {ComparePayload} data
 * @param {State} state
 * @param {Parts} parts
 * @param {number} row
 * @param {number} change
 */
const changeItem = ({ text }, state, { now, strips }, row, change) => {
  const item = make("li");
  const go = makeButton("");
  const [to, from] = now.pair().map((k) => figureOf(now.channel().values[k][row], now.channel()));
  go.append(make("span", "opd-word", wordAt(text, row)));
  go.append(make("span", "opd-changed-by", number(change, true)));
  go.append(make("span", "opd-soft", `${from} → ${to}`));
  go.addEventListener("click", () => {
    state.set("selected", row);
    strips.last.strip.reveal();
  });
  item.append(go);
  return item;
};

/**
 * Make the last lines of the list of changes.
 * @param {number} listed
 * @param {number[]} rest the largest change that is not listed, if any
 */
const restItems = (listed, rest) => [
  ...(listed ? [] : [make("li", "opd-soft", "nothing differs")]),
  ...rest.map((size) => make("li", "opd-soft", `all others by at most ${number(size)}`)),
];

/** @param {ComparePayload} data @param {State} state @param {Parts} parts */
const drawers = (data, state, parts) => {
  const { names, text, channels } = data;
  const { now, strips, legend, differenceLegend, list } = parts;
  let difference = differenceOf(now.channel(), names, now.pair());

  /** @param {number} row */
  const showToken = (row) => {
    if (row < 0 || row >= text.index.length) return;
    const scale = now.channel();
    const values = scale.values.map((some) => ({ value: some[row], scale }));
    parts.values.show([...values, { value: difference.values[row], scale: difference }]);
    const place = make("span", "opd-soft", `position ${row - text.texts[0].first}`);
    const kinds = now.pair().flatMap((k) => {
      const own = data.kinds.map((kind) => {
        return { ...kind, label: `${names[k]}, ${kind.label}`, values: kind.values[k] };
      });
      return kindsAt(own, row);
    });
    parts.word.replaceChildren(make("span", "opd-word", wordAt(text, row)), place, ...kinds);
    moveCursor(legend, scale, scale.values[now.pair()[0]][row]);
    moveCursor(differenceLegend, difference, difference.values[row]);
  };
  const showPair = () => {
    difference = differenceOf(now.channel(), names, now.pair());
    parts.picks.forEach((pick, k) => {
      pick.value = String(now.pair()[k]);
    });
    strips.last.strip.paint(difference);
    drawLegend(differenceLegend, difference);
    const { shown, next } = mostChanged(difference.values);
    const items = shown.map((row) => changeItem(data, state, parts, row, difference.values[row]));
    const rest = next === undefined ? [] : [Math.abs(difference.values[next])];
    list.replaceChildren(...items, ...restItems(items.length, rest));
    showToken(state.get("selected"));
  };
  const showChannel = () => {
    const channel = now.channel();
    parts.buttons.press(channels.indexOf(channel));
    const all = Float32Array.from(channel.values.flatMap((values) => [...values]));
    drawLegend(legend, { ...channel, values: all, peaks: [] });
    strips.own.forEach(({ strip, told }, k) => {
      strip.paint(channelOf(channel, k));
      const known = [...channel.values[k]].filter(Number.isFinite);
      const mean = measure(sum(known) / known.length, { ...channel, names: [] });
      told.textContent = known.length ? `mean ${mean}` : "";
    });
    parts.rho.show(channel.rho);
    showPair();
  };
  /** @param {number} row */
  const speak = (row) => {
    const channel = now.channel();
    const said = names.map((name, k) => `${name} ${figureOf(channel.values[k][row], channel)}`);
    const place = `position ${row}, ${wordAt(text, row)}`;
    parts.spoken.textContent = `${place}, ${channel.label}: ${said.join(", ")}`;
  };
  return { showToken, showPair, showChannel, speak };
};

define("compare", ({ box, data, state }) => {
  const size = data.text.index.length;
  const parts = makeParts(data, state);
  const draw = drawers(data, state, parts);
  arrange(box, data, parts);

  if (size && state.get("selected") < 0) state.set("selected", 0);
  state.on("channel", draw.showChannel);
  state.on("pair", draw.showPair);
  state.on("hovered", (row) => draw.showToken(row < 0 ? state.get("selected") : row));
  state.on("selected", (row) => {
    draw.showToken(row);
    if (row >= 0 && row < size) draw.speak(row);
  });
  draw.showChannel();
});
