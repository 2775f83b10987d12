// Rollouts: a table of which only the rows in sight exist, to sort and to filter, and the tokens of the row chosen.

import {
  clamp,
  define,
  drawLegend,
  make,
  measure,
  moveCursor,
  number,
  put,
  shape,
  unique,
  weightOf,
  wordOf,
} from "./core.js";
import { channelButtons, peaksIn, tokenStrip } from "./strip.js";

const LINE = 30; // px of a row, as in rollouts.css
const SHOWN = 9; // rows in sight
const WIDE = { tokens: 62, finish: 54, reward: 64, reverse_kl: 75, log_ratio: 115, peak: 64 }; // px of a column with its heading
const NARROW = ["reward", "reverse_kl", "peak"]; // columns that a narrow page has room for; of these the first two
const HEADS = {
  tokens: "tokens",
  finish: "finish",
  reward: "reward",
  reverse_kl: "mean KL",
  log_ratio: "mean log ratio",
  peak: "largest",
};

// What a live page asked for arrives as lists; none stands for what JSON does not know.
const revived = (channel) => ({
  ...channel,
  values: Float32Array.from(channel.values, (v) => v ?? NaN),
});

const sparkOf = (spark, k) => {
  const bars = spark.bins.length / spark.count;
  const signed = spark.kind === "ratio";
  const svg = shape("svg", {
    viewBox: `0 0 ${bars} 20`,
    preserveAspectRatio: "none",
    class: "opd-spark",
    "aria-hidden": "true",
  });
  const ways = { teacher: "", student: "", amount: "" };
  for (let i = 0; i < bars; i++) {
    const value = spark.bins[k * bars + i];
    const size = (signed ? 10 : 20) * weightOf(value, spark);
    if (!(size > 0.5)) continue;
    const side = signed ? (value > 0 ? "teacher" : "student") : "amount";
    const base = signed ? 10 : 20;
    ways[side] +=
      `M${i + 0.5} ${base}V${(value > 0 || !signed ? base - size : base + size).toFixed(1)}`;
  }
  for (const [side, d] of Object.entries(ways))
    if (d) svg.append(shape("path", { d, class: `opd-spark-${side}` }));
  svg.append(shape("path", { d: `M0 ${signed ? 10 : 19.5}H${bars}`, class: "opd-spark-zero" }));
  return svg;
};

define("rollouts", ({ box, data, state }) => {
  const { table, text, prompts } = data;
  const count = table.sample.length;
  const spark = { ...data.spark, count };
  const columns = ["tokens", "finish", "reward", "reverse_kl", "log_ratio", "peak"].filter(
    (key) => table[key],
  );
  const place = new Map([...table.sample].map((sample, k) => [sample, k]));
  const haystack = [...table.sample].map((_, k) =>
    `${prompts[table.prompt[k]]}\n${table.end[k]}`.toLowerCase(),
  );
  let order = [];
  let rows = new Map();

  // Controls: filter by text and by finish.
  const bar = make("div", "opd-bar opd-rollouts-bar");
  const field = put(make("input", "opd-field"), {
    type: "search",
    placeholder: "Filter prompts and texts",
    "aria-label": "Filter prompts and texts",
  });
  const finishes = [...new Set(table.finish)];
  const finish = put(make("select", "opd-pick"), { "aria-label": "Finish" });
  const told = put(make("span", "opd-soft"), { role: "status" });
  finish.append(
    put(make("option", "", "any finish"), { value: "-1" }),
    ...finishes.map((name, i) => put(make("option", "", name), { value: i })),
  );
  bar.append(field, ...(finishes.length > 1 ? [finish] : []), told);

  // The table.
  const grid = put(make("div", "opd-grid"), {
    role: "grid",
    tabindex: "0",
    "aria-label": "Rollouts",
    "aria-rowcount": String(count + 1),
  });
  const head = put(make("div", "opd-grid-row opd-grid-head"), {
    role: "row",
    "aria-rowindex": "1",
  });
  const body = put(make("div", "opd-grid-body"), { role: "rowgroup" });
  const room = put(make("div", "opd-grid-room"), { role: "none" });
  const narrow = NARROW.filter((key) => columns.includes(key)).slice(0, 2);
  const look = (key) => (columns.includes(key) && !narrow.includes(key) ? "opd-grid-wide" : "");
  const widths = (keys) => keys.map((key) => `${WIDE[key]}px`).join(" ");
  grid.style.setProperty("--columns", widths(columns));
  grid.style.setProperty("--narrow", widths(narrow));
  const heading = (label, key) => {
    const cell = put(make("div", `opd-grid-cell ${look(key)}`), { role: "columnheader" });
    if (!key) return (cell.append(label), cell);
    const button = put(make("button", "opd-button", label), { type: "button", "data-key": key });
    button.addEventListener("click", () =>
      state.set("sort", state.get("sort") === `-${key}` ? key : `-${key}`),
    );
    cell.append(button);
    return cell;
  };
  head.append(
    heading("#", "sample"),
    heading("prompt"),
    heading("…text"),
    ...columns.map((key) => heading(HEADS[key], key)),
    heading("log ratio"),
  );
  if (spark.kind !== "ratio") head.lastChild.textContent = data.channels[0]?.label ?? "";
  body.style.height = `${clamp(count, 1, SHOWN) * LINE}px`;
  body.append(room);
  grid.append(head, body);

  const value = (key, k) =>
    key === "finish" ? table.finish[k] : number(table[key][k], key === "log_ratio");
  const row = (k, i) => {
    const node = put(make("div", "opd-grid-row"), {
      role: "row",
      "aria-rowindex": String(i + 2),
      "data-k": k,
      id: unique(),
    });
    const cell = (content, look = "") =>
      put(make("div", `opd-grid-cell ${look}`, content), { role: "gridcell" });
    node.append(
      cell(String(table.sample[k])),
      cell(prompts[table.prompt[k]], "opd-grid-text"),
      cell("", "opd-grid-text opd-grid-end"),
    );
    node.lastChild.append(make("span", "", table.end[k]));
    node.append(...columns.map((key) => cell(value(key, k), `opd-grid-number ${look(key)}`)));
    const last = cell("");
    last.append(sparkOf(spark, k));
    node.append(last);
    for (const words of node.querySelectorAll(".opd-grid-text"))
      put(words, { dir: "auto", title: words.textContent });
    node.style.top = `${i * LINE}px`;
    return node;
  };
  const mark = () => {
    const chosen = place.get(state.get("rollout"));
    grid.removeAttribute("aria-activedescendant");
    for (const [k, node] of rows) {
      put(node, { "aria-selected": String(k === chosen) });
      if (k === chosen) grid.setAttribute("aria-activedescendant", node.id);
    }
  };
  const draw = () => {
    const from = Math.max(0, Math.floor(body.scrollTop / LINE) - 3);
    const to = Math.min(order.length, from + SHOWN + 7);
    const kept = new Map();
    for (let i = from; i < to; i++) {
      const k = order[i];
      const old = rows.get(k);
      kept.set(k, old && old.style.top === `${i * LINE}px` ? old : row(k, i));
    }
    rows = kept;
    room.style.height = `${order.length * LINE}px`;
    room.replaceChildren(...kept.values());
    mark();
  };
  const arrange = () => {
    const wanted = field.value.toLowerCase();
    const end = Number(finish.value);
    const key = state.get("sort").replace(/^-/, "");
    const down = state.get("sort").startsWith("-");
    order = [...table.sample.keys()].filter(
      (k) =>
        (!wanted || haystack[k].includes(wanted)) && (end < 0 || table.finish[k] === finishes[end]),
    );
    const of =
      key === "finish" ? (k) => finishes.indexOf(table.finish[k]) : (k) => table[key]?.[k] ?? k;
    const size = (k) => (Number.isNaN(of(k)) ? -Infinity : of(k));
    order.sort((a, b) => (down ? size(b) - size(a) : size(a) - size(b)) || a - b);
    told.textContent =
      order.length === count ? `${count} rollouts` : `${order.length} of ${count} rollouts`;
    for (const button of head.querySelectorAll("[data-key]")) {
      button.parentNode.setAttribute(
        "aria-sort",
        button.dataset.key === key ? (down ? "descending" : "ascending") : "none",
      );
    }
    rows = new Map();
    draw();
  };
  const reveal = (k) => {
    const i = order.indexOf(k);
    const top = i * LINE;
    if (i < 0) return;
    if (top < body.scrollTop) body.scrollTop = top;
    if (top + LINE > body.scrollTop + body.clientHeight)
      body.scrollTop = top + LINE - body.clientHeight;
    draw();
  };

  // The strip of the rollout chosen.
  const below = make("div", "opd-rollouts-text");
  const chrome = make("div", "opd-bar");
  const legend = make("div");
  const facts = make("div", "opd-timeline-told");
  const strips = new Map();
  let channel = 0;
  let open = null;
  const buttons = channelButtons(data.channels, (i) => ((channel = i), recolour()));
  chrome.append(buttons.node, legend);
  const recolour = () => {
    buttons.press(channel);
    drawLegend(legend, data.channels[channel]);
    if (open) open.strip.paint(open.channels[channel]);
  };
  const fact = (row) => {
    if (!open || row < open.first || row >= open.first + open.size) return;
    const shown = open.channels.map((c) =>
      make("span", "", `${c.label} ${measure(c.values[row], c)}`),
    );
    facts.replaceChildren(
      make("b", "", `rollout ${open.sample}`),
      make("span", "opd-soft", `${open.size} tokens, ${open.finish}`),
      make("span", "opd-word", wordOf(open.text, open.text.index[row])),
      make("span", "opd-soft", `position ${row - open.first}`),
      ...shown,
    );
    moveCursor(legend, open.channels[channel], open.channels[channel].values[row]);
  };
  // The state of a strip whose tokens only this view has: as `state`, but nobody else hears.
  const alone = () => {
    const values = { selected: 0, hovered: -1, brush: [] };
    const heard = {};
    return {
      get: (name) => values[name],
      on: (name, act) => (heard[name] ??= []).push(act),
      set: (name, next) => ((values[name] = next), (heard[name] ?? []).forEach((act) => act(next))),
    };
  };
  const opened = (sample, from, some, own) => {
    const { first, size, finish: end, prompt } = from.texts.find((t) => t.sample === sample);
    const strip = tokenStrip({
      text: from,
      first,
      size,
      finish: end,
      state: own,
      label: `Tokens of rollout ${sample}`,
    });
    strip.node.classList.toggle("opd-tall", size > 400);
    own.on("hovered", (at) => fact(at < 0 ? own.get("selected") : at));
    own.on("selected", fact);
    const drawn = some.map((c) => ({ ...c, peaks: peaksIn(c, first, size) }));
    return { sample, first, size, prompt, finish: end, text: from, channels: drawn, strip, own };
  };
  const show = (one) => {
    open = one;
    below.replaceChildren(
      put(make("div", "opd-prompt", one.prompt), { dir: "auto" }),
      one.strip.node,
    );
    recolour();
    const chosen = one.own.get("selected");
    const inside = chosen >= one.first && chosen < one.first + one.size;
    fact(inside ? chosen : (one.channels[0].peaks[0] ?? one.first));
  };
  const choose = async (sample) => {
    mark();
    if (!strips.has(sample) && text.texts.some((t) => t.sample === sample))
      strips.set(sample, opened(sample, text, data.channels, state));
    if (!strips.has(sample) && state.live && place.has(sample)) {
      const found = await state.ask({ sample });
      strips.set(sample, opened(sample, found.text, found.channels.map(revived), alone()));
      if (state.get("rollout") !== sample) return;
    }
    if (strips.has(sample)) return show(strips.get(sample));
    open = null;
    below.replaceChildren(
      make(
        "div",
        "opd-soft",
        place.has(sample)
          ? "This page has no room for the tokens of this rollout; a live view fetches them."
          : "",
      ),
    );
  };

  field.addEventListener("input", arrange);
  finish.addEventListener("change", arrange);
  let waiting = 0;
  body.addEventListener(
    "scroll",
    () => (waiting ||= requestAnimationFrame(() => ((waiting = 0), draw()))),
  );
  body.addEventListener("click", (event) => {
    const k = event.target.closest("[data-k]")?.dataset.k;
    if (k !== undefined) state.set("rollout", table.sample[k]);
  });
  grid.addEventListener("keydown", (event) => {
    if (event.target !== grid) return;
    const at = order.indexOf(place.get(state.get("rollout")));
    const to = {
      ArrowDown: at + 1,
      ArrowUp: at - 1,
      PageDown: at + SHOWN,
      PageUp: at - SHOWN,
      Home: 0,
      End: order.length - 1,
    }[event.key];
    if (to === undefined || !order.length) return;
    event.preventDefault();
    const k = order[clamp(to, 0, order.length - 1)];
    state.set("rollout", table.sample[k]);
    reveal(k);
  });

  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    bar,
    grid,
    chrome,
    facts,
    below,
  );
  state.on("sort", arrange);
  state.on("rollout", choose);
  state.on("selected", (at) => {
    const one = text.texts.find(({ first, size }) => at >= first && at < first + size);
    if (one && one.sample !== state.get("rollout"))
      (state.set("rollout", one.sample), reveal(place.get(one.sample)));
  });
  arrange();
  recolour();
  choose(state.get("rollout"));
});
