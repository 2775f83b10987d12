// Rollouts: a table of which only the rows in sight exist, to sort and to filter, and the tokens of
// the row chosen.

/** @import { Channel, RolloutsPayload, RolloutTable, Spark, State, StripState, Text } from "./types.js" */
/** @import { Strip } from "./strip.js" */

import {
  clamp,
  closest,
  completionAt,
  define,
  drawLegend,
  make,
  makeBar,
  makeButton,
  measure,
  moveCursor,
  number,
  promptBox,
  put,
  shape,
  titleOf,
  unique,
  weightOf,
  wordAt,
} from "./core.js";
import { channelButtons, peaksIn, TALL_STRIP, tokenStrip } from "./strip.js";

const ROW_HEIGHT = 30; // px, as in rollouts.css
const ROWS_SHOWN = 9;
const ROWS_BEFORE = 3; // drawn out of sight, so that scrolling shows no gap
const ROWS_AFTER = 4;

/** @typedef {"tokens" | "turns" | "finish" | "reward" | "reverse_kl" | "log_ratio" | "peak"} Column */

/** The columns: heading, and width with it, px. @type {Record<Column, { head: string, width: number }>} */
const COLUMNS = {
  tokens: { head: "tokens", width: 62 },
  finish: { head: "finish", width: 54 },
  turns: { head: "turns", width: 52 },
  reward: { head: "reward", width: 64 },
  reverse_kl: { head: "mean KL", width: 75 },
  log_ratio: { head: "mean log ratio", width: 115 },
  peak: { head: "largest", width: 64 },
};
/** @type {Column[]} */
const NARROW = ["reward", "reverse_kl", "peak"]; // a narrow page has room for the first two of these

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/** @param {RolloutTable} table */
const columnsOf = (table) =>
  /** @type {Column[]} */ (Object.keys(COLUMNS)).filter((column) => table[column]);

/**
 * Return the rows of a table that a filter keeps, sorted.
 * @param {RolloutTable} table
 * @param {string[]} texts what the filter searches, in lower case
 * @param {{ wanted: string, finish: string | null, sort: string }} view `sort` is a column, with
 *   "-" before it for the largest first, or ""
 */
export const orderOf = (table, texts, { wanted, finish, sort }) => {
  const column = sort.replace(/^-/, "");
  const sign = sort.startsWith("-") ? -1 : 1;
  const finishes = [...new Set(table.finish)];
  /** @param {number} k */
  const valueOf = (k) => {
    if (column === "finish") return finishes.indexOf(table.finish[k]);
    const values = table[/** @type {Exclude<Column, "finish">} */ (column)];
    const value = values ? values[k] : k;
    return Number.isNaN(value) ? -Infinity : value; // no number is less than any
  };
  return [...table.sample.keys()]
    .filter((k) => {
      const isFound = !wanted || texts[k].includes(wanted.toLowerCase());
      return isFound && (finish === null || table.finish[k] === finish);
    })
    .sort((a, b) => sign * (valueOf(a) - valueOf(b)) || a - b);
};

// What a live page asked for arrives as lists; null stands for what JSON does not know.
/** @param {Channel & { values: ArrayLike<number | null> }} channel @returns {Channel} */
const revived = (channel) => ({
  ...channel,
  values: Float32Array.from(channel.values, (value) => value ?? NaN),
});

/**
 * The state of a strip whose tokens only this view has: nobody else hears of it.
 * @returns {StripState}
 */
const privateState = () => {
  /** @type {Record<string, any>} */
  const values = { selected: 0, hovered: -1, brush: [] };
  /** @type {Record<string, ((value: any) => unknown)[]>} */
  const listeners = {};
  return {
    get: (name) => values[name],
    on: (name, act) => {
      listeners[name] = [...(listeners[name] ?? []), act];
    },
    set: (name, value) => {
      values[name] = value;
      for (const act of listeners[name] ?? []) act(value);
    },
  };
};

// ── The table ────────────────────────────────────────────────────────────────────────────────────

/**
 * Draw the log ratio of one rollout as small bars.
 * @param {Spark} spark
 * @param {number} k
 * @param {number} count rollouts
 */
const sparkOf = (spark, k, count) => {
  const bars = spark.bins.length / count;
  const signed = spark.kind === "ratio";
  const base = signed ? 10 : 20;
  const svg = shape("svg", {
    viewBox: `0 0 ${bars} 20`,
    preserveAspectRatio: "none",
    class: "opd-spark",
    "aria-hidden": "true",
  });
  /** @type {Record<string, string>} */
  const paths = { teacher: "", student: "", amount: "" };
  for (let i = 0; i < bars; i++) {
    const value = spark.bins[k * bars + i];
    const size = base * weightOf(value, spark);
    if (!(size > 0.5)) continue;
    const isUp = value > 0 || !signed;
    const side = isUp ? "teacher" : "student";
    const end = (isUp ? base - size : base + size).toFixed(1);
    paths[signed ? side : "amount"] += `M${i + 0.5} ${base}V${end}`;
  }
  for (const [side, path] of Object.entries(paths)) {
    if (path) svg.append(shape("path", { d: path, class: `opd-spark-${side}` }));
  }
  const zero = `M0 ${signed ? 10 : 19.5}H${bars}`;
  svg.append(shape("path", { d: zero, class: "opd-spark-zero" }));
  return svg;
};

/** @param {Column[]} columns */
const narrowColumns = (columns) => NARROW.filter((column) => columns.includes(column)).slice(0, 2);

/**
 * Return the function that gives a column's class: those that a narrow page leaves out are wide.
 * @param {Column[]} columns
 */
const lookOf = (columns) => {
  const narrow = narrowColumns(columns);
  return (/** @type {string} */ column) => {
    const known = columns.find((one) => one === column);
    return known && !narrow.includes(known) ? "opd-grid-wide" : "";
  };
};

/**
 * Make the head of the table. Pressing a heading sorts by it, again the other way round.
 * @param {RolloutsPayload} data
 * @param {State} state
 */
const tableHead = ({ table, spark, channels }, state) => {
  const columns = columnsOf(table);
  const look = lookOf(columns);
  const node = put(make("div", "opd-grid-row opd-grid-head"), {
    role: "row",
    "aria-rowindex": "1",
  });
  /** @param {string} words @param {string} [width] */
  const heading = (words, width = "") => {
    const cell = put(make("div", `opd-grid-cell ${width}`), { role: "columnheader" });
    cell.append(words);
    node.append(cell);
    return cell;
  };
  /** @param {string} words @param {string} key */
  const sortable = (words, key) => {
    const cell = heading("", look(key));
    const sort = put(makeButton("", words), { "data-key": key });
    sort.addEventListener("click", () => {
      state.set("sort", state.get("sort") === `-${key}` ? key : `-${key}`);
    });
    cell.append(sort);
    return { cell, key };
  };
  const byNumber = sortable("#", "sample");
  heading("prompt");
  heading("…text");
  const cells = [byNumber, ...columns.map((column) => sortable(COLUMNS[column].head, column))];
  heading(spark.kind === "ratio" ? "log ratio" : (channels[0]?.label ?? ""));
  const showSort = () => {
    const sort = state.get("sort");
    for (const { cell, key } of cells) {
      const direction = sort.startsWith("-") ? "descending" : "ascending";
      put(cell, { "aria-sort": sort.replace(/^-/, "") === key ? direction : "none" });
    }
  };
  return { node, showSort };
};

/**
 * Return the function that makes the table's row of rollout k at place i.
 * @param {RolloutsPayload} data
 */
const tableRows = ({ table, prompts, spark }) => {
  const columns = columnsOf(table);
  const look = lookOf(columns);
  /** @param {string} words @param {string} [classes] */
  const cell = (words, classes = "") =>
    put(make("div", `opd-grid-cell ${classes}`, words), { role: "gridcell" });
  /** @param {Column} column @param {number} k */
  const figure = (column, k) => {
    if (column === "finish") return table.finish[k];
    return number(table[column]?.[k] ?? NaN, column === "log_ratio");
  };
  /** @param {number} k @param {number} i */
  return (k, i) => {
    const node = put(make("div", "opd-grid-row"), {
      role: "row",
      "aria-rowindex": i + 2,
      "data-k": k,
      id: unique(),
    });
    const prompt = cell(prompts[table.prompt[k]], "opd-grid-text");
    const end = cell("", "opd-grid-text opd-grid-end");
    end.append(make("span", "", table.end[k]));
    for (const words of [prompt, end]) put(words, { dir: "auto", title: words.textContent });
    const figures = columns.map((column) => {
      return cell(figure(column, k), `opd-grid-number ${look(column)}`);
    });
    const last = cell("");
    last.append(sparkOf(spark, k, table.sample.length));
    node.append(cell(String(table.sample[k])), prompt, end, ...figures, last);
    node.style.top = `${i * ROW_HEIGHT}px`;
    return node;
  };
};

/** @param {RolloutTable} table */
const emptyGrid = (table) => {
  const count = table.sample.length;
  const columns = columnsOf(table);
  const node = put(make("div", "opd-grid"), {
    role: "grid",
    tabindex: "0",
    "aria-label": "Rollouts",
    "aria-rowcount": count + 1,
  });
  const body = put(make("div", "opd-grid-body"), { role: "rowgroup" });
  const room = put(make("div", "opd-grid-room"), { role: "none" }); // as high as all rows
  body.style.height = `${clamp(count, 1, ROWS_SHOWN) * ROW_HEIGHT}px`;
  body.append(room);
  const widths = (/** @type {Column[]} */ some) =>
    some.map((column) => `${COLUMNS[column].width}px`).join(" ");
  node.style.setProperty("--columns", widths(columns));
  node.style.setProperty("--narrow", widths(narrowColumns(columns)));
  return { node, body, room };
};

/**
 * Make the grid: `show(order)` draws the rows in sight of an order, `reveal(k)` scrolls to one.
 * @param {RolloutsPayload} data
 * @param {State} state
 * @param {(sample: number) => number | undefined} placeOf
 */
const rolloutGrid = (data, state, placeOf) => {
  const makeRow = tableRows(data);
  const { node, body, room } = emptyGrid(data.table);
  const head = tableHead(data, state);
  node.append(head.node, body);
  /** @type {number[]} */
  let order = [];
  /** @type {Map<number, HTMLElement>} */
  let rows = new Map();
  const mark = () => {
    const chosen = placeOf(state.get("rollout"));
    node.removeAttribute("aria-activedescendant");
    for (const [k, row] of rows) {
      put(row, { "aria-selected": k === chosen });
      if (k === chosen) put(node, { "aria-activedescendant": row.id });
    }
  };
  const draw = () => {
    const from = Math.max(0, Math.floor(body.scrollTop / ROW_HEIGHT) - ROWS_BEFORE);
    const drawn = order.slice(from, from + ROWS_BEFORE + ROWS_SHOWN + ROWS_AFTER);
    const kept = drawn.map((k, j) => {
      const old = rows.get(k);
      const isInPlace = old?.style.top === `${(from + j) * ROW_HEIGHT}px`;
      return /** @type {[number, HTMLElement]} */ ([
        k,
        old && isInPlace ? old : makeRow(k, from + j),
      ]);
    });
    rows = new Map(kept);
    room.style.height = `${order.length * ROW_HEIGHT}px`;
    room.replaceChildren(...rows.values());
    mark();
  };
  /** @param {number[]} next */
  const show = (next) => {
    order = next;
    rows = new Map();
    head.showSort();
    draw();
  };
  /** @param {number | undefined} k */
  const reveal = (k = -1) => {
    const i = order.indexOf(k);
    if (i < 0) return;
    const top = i * ROW_HEIGHT;
    body.scrollTop = clamp(body.scrollTop, top + ROW_HEIGHT - body.clientHeight, top);
    draw();
  };
  return { node, body, draw, show, reveal, mark, order: () => order };
};

/**
 * Scrolling draws the rows in sight; clicks and keys choose a rollout.
 * @param {ReturnType<typeof rolloutGrid>} grid
 * @param {RolloutTable} table
 * @param {State} state
 * @param {(sample: number) => number | undefined} placeOf
 */
const listenToGrid = ({ node, body, draw, order, reveal }, table, state, placeOf) => {
  let waiting = 0;
  body.addEventListener("scroll", () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      draw();
    });
  });
  body.addEventListener("click", (event) => {
    const k = closest(event, "[data-k]")?.dataset.k;
    if (k !== undefined) state.set("rollout", table.sample[Number(k)]);
  });
  node.addEventListener("keydown", (event) => {
    if (event.target !== node) return;
    const last = order().length - 1;
    const at = order().indexOf(placeOf(state.get("rollout")) ?? -1);
    /** @type {Record<string, number>} */
    const steps = {
      ArrowDown: at + 1,
      ArrowUp: at - 1,
      PageDown: at + ROWS_SHOWN,
      PageUp: at - ROWS_SHOWN,
      Home: 0,
      End: last,
    };
    const to = steps[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    const k = order()[clamp(to, 0, last)];
    state.set("rollout", table.sample[k]);
    reveal(k);
  });
};

/**
 * Make the filter by text and by finish.
 * @param {RolloutsPayload} data
 * @param {() => void} hear is told of changes
 */
const filterBar = ({ table, prompts }, hear) => {
  const node = make("div", "opd-bar opd-rollouts-bar");
  const texts = [...table.sample.keys()].map((k) =>
    `${prompts[table.prompt[k]]}\n${table.end[k]}`.toLowerCase(),
  );
  const words = "Filter prompts and texts";
  const field = put(make("input", "opd-field"), {
    type: "search",
    placeholder: words,
    "aria-label": words,
  });
  const finishes = [...new Set(table.finish)];
  const finish = put(make("select", "opd-pick"), { "aria-label": "Finish" });
  ["any finish", ...finishes].forEach((name, i) => {
    finish.append(put(make("option", "", name), { value: i - 1 }));
  });
  const told = put(make("span", "opd-soft"), { role: "status" });
  node.append(field, ...(finishes.length > 1 ? [finish] : []), told);
  field.addEventListener("input", hear);
  finish.addEventListener("change", hear);
  /** @param {string} sort */
  const order = (sort) => {
    const chosen = finishes[Number(finish.value)] ?? null;
    const rows = orderOf(table, texts, { wanted: field.value, finish: chosen, sort });
    const count = texts.length;
    told.textContent = `${rows.length === count ? "" : `${rows.length} of `}${count} rollouts`;
    return rows;
  };
  return { node, order };
};

// ── The tokens of one rollout ────────────────────────────────────────────────────────────────────

/**
 * A rollout whose tokens are here: its strip, and the state that the strip follows.
 * @typedef {object} OpenRollout
 * @property {number} sample
 * @property {number} first
 * @property {number} size
 * @property {string} prompt
 * @property {string} finish
 * @property {Text} text
 * @property {Channel[]} channels
 * @property {Strip} strip
 * @property {StripState} own
 */

/**
 * @param {number} sample
 * @param {Text} text
 * @param {Channel[]} channels
 * @param {StripState} own
 * @returns {OpenRollout | null}
 */
const openRollout = (sample, text, channels, own) => {
  const completion = text.texts.find((one) => one.sample === sample);
  if (!completion) return null;
  const { first, size } = completion;
  const label = `Tokens of rollout ${sample}`;
  const strip = tokenStrip({ text, first, size, finish: completion.finish, state: own, label });
  strip.node.classList.toggle("opd-tall", size > TALL_STRIP);
  const peaked = channels.map((one) => ({ ...one, peaks: peaksIn(one, first, size) }));
  return { ...completion, text, channels: peaked, strip, own };
};

/**
 * Make the place under the table where the chosen rollout is shown.
 * @param {RolloutsPayload} data
 */
const rolloutPlace = ({ channels }) => {
  const below = make("div", "opd-rollouts-text");
  const legend = make("div");
  const facts = make("div", "opd-timeline-told");
  let chosen = 0; // channel
  /** @type {OpenRollout | null} */
  let shown = null;
  const showChannel = () => {
    buttons.press(chosen);
    drawLegend(legend, channels[chosen]);
    shown?.strip.paint(shown.channels[chosen]);
  };
  const buttons = channelButtons(channels, (i) => {
    chosen = i;
    showChannel();
  });
  /** @param {number} row */
  const showFacts = (row) => {
    if (!shown || row < shown.first || row >= shown.first + shown.size) return;
    const { sample, size, finish, text, first } = shown;
    const values = shown.channels.map((one) => `${one.label} ${measure(one.values[row], one)}`);
    facts.replaceChildren(
      make("b", "", `rollout ${sample}`),
      make("span", "opd-soft", `${size} tokens, ${finish}`),
      make("span", "opd-word", wordAt(text, row)),
      make("span", "opd-soft", `position ${row - first}`),
      ...values.map((value) => make("span", "", value)),
    );
    moveCursor(legend, shown.channels[chosen], shown.channels[chosen].values[row]);
  };
  /** @param {OpenRollout} rollout */
  const show = (rollout) => {
    shown = rollout;
    below.replaceChildren(promptBox(rollout.prompt), rollout.strip.node);
    showChannel();
    const { first, size } = rollout;
    const row = rollout.own.get("selected");
    const isInside = row >= first && row < first + size;
    showFacts(isInside ? row : (rollout.channels[0].peaks[0] ?? first));
  };
  /** @param {string} words */
  const showNone = (words) => {
    shown = null;
    below.replaceChildren(make("div", "opd-soft", words));
  };
  const nodes = [makeBar(buttons.node, legend), facts, below];
  return { nodes, show, showNone, showChannel, showFacts };
};

/**
 * Return the function that shows a rollout; a live page asks Python for tokens that it lacks.
 * @param {RolloutsPayload} data
 * @param {State} state
 * @param {ReturnType<typeof rolloutPlace>} place
 */
const rolloutOpener = ({ text, channels, table }, state, place) => {
  /** @type {Map<number, OpenRollout>} */
  const opened = new Map();
  const samples = new Set(table.sample);
  /** @param {number} sample @param {Text} from @param {Channel[]} some @param {StripState} own */
  const keep = (sample, from, some, own) => {
    const rollout = openRollout(sample, from, some, own);
    if (!rollout) return;
    own.on("hovered", (row) => place.showFacts(row < 0 ? own.get("selected") : row));
    own.on("selected", place.showFacts);
    opened.set(sample, rollout);
  };
  /** @param {number} sample */
  return async (sample) => {
    if (!opened.has(sample)) keep(sample, text, channels, state);
    if (!opened.has(sample) && state.live && samples.has(sample)) {
      const found = await state.ask({ sample });
      keep(sample, found.text, found.channels.map(revived), privateState());
      if (state.get("rollout") !== sample) return; // the reader has gone on
    }
    const rollout = opened.get(sample);
    const isElsewhere = samples.has(sample);
    if (rollout) place.show(rollout);
    else if (!isElsewhere) place.showNone("");
    else
      place.showNone(
        "This page has no room for the tokens of this rollout; a live view fetches them.",
      );
  };
};

define("rollouts", ({ box, data, state }) => {
  const { table, text } = data;
  const places = new Map([...table.sample].map((sample, k) => [sample, k]));
  const placeOf = (/** @type {number} */ sample) => places.get(sample);
  const grid = rolloutGrid(data, state, placeOf);
  const place = rolloutPlace(data);
  const open = rolloutOpener(data, state, place);
  const sort = () => grid.show(filter.order(state.get("sort")));
  const filter = filterBar(data, sort);
  /** @param {number} sample */
  const choose = (sample) => {
    grid.mark();
    open(sample);
  };
  listenToGrid(grid, table, state, placeOf);
  const sums = data.by_turn ? [make("div", "opd-soft opd-rollouts-turns", data.by_turn)] : [];
  box.append(...titleOf(data), filter.node, grid.node, ...sums, ...place.nodes);
  state.on("sort", sort);
  state.on("rollout", choose);
  state.on("selected", (row) => {
    const completion = completionAt(text, row);
    if (!completion || completion.sample === state.get("rollout")) return;
    state.set("rollout", completion.sample);
    grid.reveal(placeOf(completion.sample));
  });
  sort();
  place.showChannel();
  choose(state.get("rollout"));
});
