// TailAudit: curves against k, a slider for k, and at each token what its top k cover and miss.

/** @import { Channel, State, TailPayload } from "./types.js" */

import {
  clamp,
  define,
  drawLegend,
  make,
  makeBar,
  moveCursor,
  number,
  put,
  titleOf,
  wordAt,
} from "./core.js";
import { linePlot } from "./lines.js";
import { channelButtons, peaksIn, TALL_STRIP, tokenStrip } from "./strip.js";

/** @param {number} share */
const percentOf = (share) => `${number(share)} %`;

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * The numbers of the payload at the chosen k.
 * @param {TailPayload} data
 * @param {State} state
 */
const atChosenK = (data, state) => {
  const size = data.text.index.length;
  const place = () => Math.max(0, data.ks.indexOf(state.get("k")));
  /** @param {"missed" | "student" | "rival"} name */
  const values = (name) => data[name].subarray(place() * size, (place() + 1) * size);
  /** @returns {Channel[]} */
  const channels = () => {
    const rival = values("rival");
    const uncovered = values("student").map((share, row) => 100 - Math.min(share, rival[row]));
    const shared = { kind: "amount", names: [], peaks: [] };
    return [
      {
        ...shared,
        key: "missed",
        label: "missed KL",
        unit: "nats",
        less: "read whole",
        more: "not seen",
        limit: data.limit,
        values: values("missed"),
      },
      {
        ...shared,
        key: "uncovered",
        label: "uncovered mass",
        unit: "%",
        less: "all covered",
        more: "half or more not",
        limit: 50,
        values: Float32Array.from(uncovered),
      },
    ];
  };
  const channel = () => {
    const all = channels();
    return all.find(({ key }) => key === state.get("channel")) ?? all[0];
  };
  /** @param {number} step */
  const move = (step) => state.set("k", data.ks[clamp(place() + step, 0, data.ks.length - 1)]);
  return { place, values, channels, channel, move };
};

/**
 * Return the means over all tokens at one k, in words.
 * @param {TailPayload} data
 * @param {number} k
 */
const totalsAt = ({ curve, by, against }, k) => {
  const at = curve.k.indexOf(k);
  if (at < 0) return "";
  const student = percentOf(100 * curve.student_mass[at]);
  const rival = percentOf(100 * curve.rival_mass[at]);
  const read = `${number(curve.bucket[at])} of ${number(curve.exact[at])} nats`;
  const share = percentOf(100 * curve.read[at]);
  const cover = `The ${by}'s top ${k} cover ${student} of the student, ${rival} of ${against}`;
  return `${cover}, and read ${read} (${share}).`;
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/** @param {TailPayload} data */
const curvesOf = (data) => {
  const node = make("div", "opd-tail-plots");
  const plots = data.plots.map((plot) => {
    const drawn = linePlot(plot);
    const keys = make("div", "opd-tail-keys");
    for (const { name, look, kind } of plot.lines) {
      keys.append(make("span", `opd-lp-key opd-l-${look} opd-l-${kind}`, name));
    }
    drawn.node.append(keys);
    node.append(drawn.node);
    return drawn;
  });
  const mark = (/** @type {number} */ k) => plots.forEach((plot) => plot.mark(k));
  return { node, mark };
};

/** @param {number[]} ks @param {State} state */
const sliderOfK = (ks, state) => {
  const node = make("label", "opd-tail-k");
  const shown = make("output");
  const slider = put(make("input"), {
    type: "range",
    min: "0",
    max: String(ks.length - 1),
    step: "1",
    "aria-label": "k, how many tokens are scored",
  });
  slider.addEventListener("input", () => state.set("k", ks[Number(slider.value)]));
  node.append("top k", slider, shown);
  /** @param {number} place */
  const show = (place) => {
    slider.value = String(place);
    shown.textContent = String(state.get("k"));
  };
  return { node, show };
};

define("tail", ({ box, data, state }) => {
  const { text, against } = data;
  const now = atChosenK(data, state);
  const keysOfChannels = now.channels().map(({ key }) => key);
  /** @param {KeyboardEvent} event */
  const keys = ({ key }) => {
    const channel = keysOfChannels[Number(key) - 1];
    if (channel) state.set("channel", channel);
    else if (key === "[" || key === "]") now.move(key === "]" ? 1 : -1);
    else return false;
    return true;
  };
  const strip = tokenStrip({ text, finish: data.finish, state, keys });
  strip.node.classList.toggle("opd-tall", strip.size > TALL_STRIP);
  const curves = curvesOf(data);
  const slider = sliderOfK(data.ks, state);
  const buttons = channelButtons(now.channels(), (i) => state.set("channel", keysOfChannels[i]));
  const legend = make("div");
  const told = put(make("div", "opd-tail-told"), { role: "status" });
  const badge = make("div", "opd-tail-badge");

  /** @param {number} row */
  const showToken = (row) => {
    if (row < 0 || row >= strip.size) return;
    const [missed, student, rival] = [
      now.values("missed"),
      now.values("student"),
      now.values("rival"),
    ];
    const exact = data.exact[row];
    const cover = `top-${state.get("k")} covers ${percentOf(student[row])}`;
    const position = row - (text.texts[0]?.first ?? 0);
    badge.replaceChildren(
      make("span", "opd-word", wordAt(text, row)),
      make("span", "opd-soft", `position ${position}`),
      make("b", "opd-tail-cover", cover),
      make("span", "", `of student, ${percentOf(rival[row])} of ${against}`),
      make("span", "", `reads ${number(exact - missed[row])} of ${number(exact)} nats`),
    );
    moveCursor(legend, now.channel(), now.channel().values[row]);
  };
  const redraw = () => {
    const channel = now.channel();
    const k = state.get("k");
    slider.show(now.place());
    curves.mark(k);
    told.textContent = totalsAt(data, k);
    buttons.press(keysOfChannels.indexOf(channel.key));
    strip.paint({ ...channel, peaks: peaksIn(channel, 0, strip.size) });
    drawLegend(legend, channel);
    showToken(state.get("hovered") < 0 ? state.get("selected") : state.get("hovered"));
  };

  const chrome = makeBar(buttons.node, legend);
  box.append(...titleOf(data), makeBar(slider.node, told), curves.node, chrome, strip.node, badge);
  if (strip.size && state.get("selected") < 0) state.set("selected", 0);
  state.on("k", redraw);
  state.on("channel", redraw);
  state.on("selected", showToken);
  state.on("hovered", (row) => showToken(row < 0 ? state.get("selected") : row));
  redraw();
});
