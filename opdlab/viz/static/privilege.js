// PrivilegeLens: the gap of each token as its colour and, in rows under the text, what it is made of: information and capability.
// `data` has { text, channels, sides, logp, entropy, least, all } as `privilege_lens.PrivilegeLens.data` makes it.

import {
  clamp,
  define,
  drawLegend,
  make,
  moveCursor,
  number,
  percent,
  put,
  wordOf,
} from "./core.js";
import { LONG_STRIP, miniMap } from "./minimap.js";
import { tokenStrip } from "./strip.js";
import { paintTracks } from "./tracks.js";

const arrow = (v) => (v > 0 ? " ▲" : v < 0 ? " ▼" : "");
const signed = (v) => number(v, true) + arrow(v);
const sum = (values) => values.reduce((a, v) => a + (Number.isNaN(v) ? 0 : v), 0);
const short = (v) =>
  !Number.isFinite(v)
    ? number(v)
    : Math.abs(v) < 0.005
      ? "0"
      : `${v > 0 ? "+" : "−"}${Math.abs(v).toFixed(2)}`; // of a table, two decimals
const sideOfSign = (v) => (v > 0 ? "opd-of-teacher" : "opd-of-student");

// A bar between two places of a track, 0 to 1.
const spanBar = (from, to, look) => {
  const track = make("span", "opd-track opd-between");
  const fill = make("span", `opd-fill ${look}`);
  fill.style.left = `${100 * Math.min(from, to)}%`;
  fill.style.width = `${100 * Math.abs(to - from)}%`;
  track.append(fill);
  return track;
};

const columnsOf = (node, cells) => {
  for (const [look, words] of cells)
    node.append(words instanceof Node ? words : make("span", look, words));
  return node;
};

// From the log-prob of the whole text under the student to that under the hinted teacher.
const waterfall = ({ sides, logp, channels }) => {
  const node = make("div", "opd-fall");
  const totals = Object.fromEntries(
    Object.entries(logp).map(([key, values]) => [key, sum(values)]),
  );
  const low = Math.min(-1e-9, ...Object.values(totals).filter(Number.isFinite));
  const scale = (v) => clamp(1 - v / low, 0, 1);
  const step = (name, from, to, look, value) =>
    node.append(
      columnsOf(make("div", `opd-fall-row ${look}`), [
        ["opd-name", name],
        ["", spanBar(scale(from), scale(to), look)],
        ["opd-value", value],
      ]),
    );
  node.append(make("div", "opd-heading", "log-prob of the whole text, nats"));
  step(sides.student, 0, totals.student, "opd-total", number(totals.student));
  for (const [key, from, to] of [
    ["capability", "student", "plain"],
    ["information", "plain", "informed"],
  ]) {
    const value = sum(channels.find((c) => c.key === key).values);
    step(`+ ${key}`, totals[from], totals[to], `opd-step ${sideOfSign(value)}`, signed(value));
    step(sides[to], 0, totals[to], "opd-total", number(totals[to]));
  }
  if (logp.wrong) {
    const value = sum(channels.find((c) => c.key === "wrong").values);
    step(
      "wrong hint instead",
      totals.plain,
      totals.wrong,
      `opd-step ${sideOfSign(value)}`,
      signed(value),
    );
  }
  return node;
};

// Means by type over the whole trace; `draw(flags)` fills the share of flagged tokens.
const typeTable = ({ all }) => {
  const node = make("div", "opd-types");
  const keys = ["information", "capability", ...(all.wrong ? ["wrong"] : [])];
  const kinds = [
    ["all", () => true],
    ...all.names.map((name, k) => [name, (i) => all.type[i] === k]),
  ];
  const rows = kinds.map(([name, holds]) => {
    const which = [...all.gap.keys()].filter(holds);
    const real = (values) => which.map((i) => values[i]).filter((v) => !Number.isNaN(v));
    return { name, which, means: keys.map((key) => sum(real(all[key])) / real(all[key]).length) };
  });
  const top = Math.max(
    ...rows.flatMap(({ means }) => means.map(Math.abs).filter(Number.isFinite)),
    0.1,
  );
  const half = (v) => clamp(0.5 + (Math.sign(v) * Math.sqrt(Math.abs(v) / top)) / 2, 0, 1);
  node.style.setProperty("--parts", keys.length);
  node.append(make("div", "opd-heading", "mean by type of token, all completions, nats"));
  node.append(
    columnsOf(make("div", "opd-type opd-soft"), [
      ["", "type"],
      ["opd-count", "tokens"],
      ...keys.map((key) => ["opd-part-name", key === "wrong" ? "wrong hint" : key]),
      ["opd-count", "flagged"],
    ]),
  );
  const shares = rows.map(({ name, which, means }) => {
    const row = put(make("div", "opd-type"), { "data-type": name });
    const flagged = make("span", "opd-count");
    columnsOf(row, [
      ["opd-type-name", name],
      ["opd-count", which.length.toLocaleString("en")],
    ]);
    for (const value of means) {
      const cell = make("span", "opd-mean");
      cell.append(
        spanBar(0.5, short(value) === "0" ? 0.5 : half(value), sideOfSign(value)),
        make("span", "opd-value", short(value)),
      );
      row.append(cell);
    }
    row.append(flagged);
    node.append(row);
    return { which, flagged };
  });
  const draw = (isFlagged) => {
    for (const { which, flagged } of shares)
      flagged.textContent = percent(which.filter(isFlagged).length / (which.length || 1));
  };
  return { node, draw };
};

define("privilege", ({ box, data, state }) => {
  const { text, channels, sides, logp, entropy, all } = data;
  const size = text.index.length;
  const order = ["student", "plain", "informed", "wrong"];
  const channel = Object.fromEntries(channels.map((c) => [c.key, c]));
  const policies = order.filter((key) => key in sides);
  const legend = make("div");
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const flags = (values, i) =>
    Math.abs(values.information[i]) > Math.max(Math.abs(values.capability[i]), data.least) &&
    values.entropy[i] > state.get("undecided");
  const own = {
    information: channel.information.values,
    capability: channel.capability.values,
    entropy: entropy.plain ?? [],
  };
  const isLeak = (row) => flags(own, row);

  const strip = tokenStrip({ text, finish: data.finish, state });
  // What is too small to have a height has no bar, or every token would have one.
  const lanes = channels
    .filter(({ key }) => key !== "gap")
    .map((c) => ({ ...c, values: c.values.map((v) => (Math.abs(v) < c.limit / 64 ? 0 : v)) }));
  const map = size > LONG_STRIP ? miniMap(strip, data.segments) : null;
  const drawMap = () =>
    map?.draw([channel.gap, ...lanes], {
      peaks: channel.gap.peaks,
      found: [],
      chosen: state.get("selected"),
    });
  strip.node.classList.toggle("opd-tall", Boolean(map));
  const lanesKey = make("div", "opd-lanes opd-soft");
  lanesKey.append(make("span", "", "under the text, up is for the token and down against it:"));
  lanes.forEach((c, i) => {
    const item = make("span", "opd-lane-name");
    item.append(make("b", "", `${i + 1} ${c.label}`));
    item.title = c.formula;
    lanesKey.append(item);
  });
  if (entropy.plain) lanesKey.append(make("span", "", "⚑ leak"));

  // The panel of one token.
  const panel = make("div", "opd-panel");
  const head = make("div", "opd-privilege-head");
  const bars = make("div", "opd-policies");
  const split = make("div", "opd-split");
  panel.append(head, bars, split);
  const verdict = (row) => {
    if (isLeak(row)) return "⚑ leak: the hint decides, and without it the teacher is undecided";
    const information = Math.abs(own.information[row]);
    const capability = Math.abs(own.capability[row]);
    if (Math.max(information, capability) <= data.least) return "nobody knows better";
    if (information > capability)
      return entropy.plain
        ? "information, but the teacher is decided without it as well"
        : "information outweighs capability";
    return "capability: the teacher knows this without the hint";
  };
  const show = (row) => {
    if (row < 0 || row >= size) return;
    const kind = all.names.length ? all.names[all.type[data.start + row]] : "";
    head.replaceChildren(
      make("span", "opd-word", wordOf(text, text.index[row])),
      make("span", "opd-soft", `sampled at position ${row}${kind ? ` · ${kind}` : ""}`),
      make("b", "opd-verdict", verdict(row)),
    );
    bars.replaceChildren(
      ...policies.map((key) => {
        const p = Math.exp(logp[key][row]);
        const look = key === "student" ? "opd-of-student" : "opd-of-teacher";
        return columnsOf(make("div", "opd-policy"), [
          ["opd-name", sides[key]],
          ["", spanBar(0, p, look)],
          ["opd-value", percent(p)],
          ["opd-soft opd-value", `log p ${number(logp[key][row])}`],
          ["opd-soft opd-value", entropy[key] ? `H ${entropy[key][row].toFixed(2)}` : ""],
        ]);
      }),
    );
    const fact = (c) => {
      const node = put(make("span", "opd-fact"), { "data-channel": c.key });
      node.append(
        make("span", "opd-name", c.label),
        make("span", "opd-value", signed(c.values[row])),
      );
      return node;
    };
    split.replaceChildren(
      fact(channel.gap),
      make("span", "opd-equation-sign", "="),
      fact(channel.information),
      make("span", "opd-equation-sign", "+"),
      fact(channel.capability),
      ...(channel.wrong ? [fact(channel.wrong)] : []),
    );
    moveCursor(legend, channel.gap, channel.gap.values[row]);
  };
  const speak = (row) =>
    (spoken.textContent = `position ${row}, ${wordOf(text, text.index[row])}, information ${number(own.information[row], true)}, capability ${number(own.capability[row], true)}, ${verdict(row)}`);

  // What counts as undecided.
  const types = typeTable(data);
  const knob = make("label", "opd-undecided");
  const range = make("input");
  const told = make("output");
  put(range, {
    type: "range",
    min: 0,
    max: Math.max(2, ...all.entropy.filter(Number.isFinite)).toFixed(2),
    step: 0.01,
    "aria-label": "Entropy from which the teacher without the hint counts as undecided, nats",
  });
  range.addEventListener("input", () => state.set("undecided", Number(range.value)));
  knob.append(
    make(
      "span",
      "",
      `⚑ where information outweighs capability and the entropy of ${sides.plain} is above`,
    ),
    range,
    told,
  );
  const flag = () => {
    const level = state.get("undecided");
    range.value = level;
    for (const { ink, first, size: n } of strip.glyphs) {
      let leak = false;
      for (let row = first; row < first + n; row++) leak ||= isLeak(row);
      ink.parentNode.toggleAttribute("data-leak", leak);
    }
    types.draw((i) => flags(all, i));
    const count = own.information.reduce((n, _, i) => n + isLeak(i), 0);
    told.textContent = `${number(level)} nats: ${count} of ${size} tokens here`;
    show(state.get("hovered") < 0 ? state.get("selected") : state.get("hovered"));
  };

  const bar = make("div", "opd-bar");
  const sums = make("div", "opd-sums");
  bar.append(legend, lanesKey);
  sums.append(waterfall(data), types.node);
  drawLegend(legend, channel.gap);
  strip.paint(channel.gap);
  paintTracks(strip, lanes);
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    put(make("div", "opd-prompt", data.prompt), { dir: "auto" }),
  );
  box.append(
    bar,
    ...(map ? [map.node] : []),
    strip.node,
    panel,
    sums,
    ...(entropy.plain ? [knob] : []),
    spoken,
  );
  state.on("selected", (row) => (show(row), map?.mark(row), row >= 0 && row < size && speak(row)));
  state.on("hovered", (row) => show(row < 0 ? state.get("selected") : row));
  state.on("undecided", flag);
  if (size && state.get("selected") < 0) state.set("selected", channel.gap.peaks[0] ?? 0);
  flag();
  drawMap();
  return () => map?.close();
});
