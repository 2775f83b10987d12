// Regimes: the tokens of a trace as points over two numbers, with two lines to drag, shares by
// quadrant, a region to brush.

/** @import { RegimesPayload, State } from "./types.js" */

import {
  completionAt,
  define,
  liveRegion,
  make,
  number,
  titleOf,
  watchWidth,
  wordAt,
} from "./core.js";
import { choiceOf, quadrantRegion, rowsInRegion, runsOf } from "./regimes_model.js";
import { groupChips, makeChoosers, quadrantTable, tokenList } from "./regimes_parts.js";
import { listenToHandles, listenToPlotKeys, listenToPoints, scatterPlot } from "./regimes_plot.js";

/**
 * Mark the region's tokens in the strips of the completion that is looked at.
 * @param {RegimesPayload} data
 * @param {State} state
 * @param {number[]} rows
 */
const brushRows = ({ text }, state, rows) => {
  const completion = completionAt(text, state.get("selected"));
  const { first, size } = completion ?? { first: 0, size: 0 };
  const own = rows.filter((row) => row >= first && row < first + size);
  state.set("brush", runsOf(own));
};

/**
 * Make the parts of the page and what they do to one another.
 * @param {RegimesPayload} data
 * @param {State} state
 */
const makeParts = (data, state) => {
  const scatter = scatterPlot(state);
  const choosers = makeChoosers(data, state);
  const list = tokenList(data, state);
  /** @param {number[]} region [left, right, low, high], or [] */
  const choose = (region) => {
    state.set("region", region);
    if (!region.length) {
      brushRows(data, state, []);
      return;
    }
    const listed = list.rows();
    if (listed.length && !listed.includes(state.get("selected"))) state.set("selected", listed[0]);
    brushRows(data, state, rowsInRegion(scatter.choice(), region));
  };
  /** @param {number} quadrant */
  const chooseQuadrant = (quadrant) => choose(quadrantRegion(scatter.choice(), state, quadrant));
  const quadrants = quadrantTable(data, state, chooseQuadrant);
  const showList = () => {
    const region = state.get("region");
    const choice = scatter.choice();
    list.draw(region.length === 4 ? rowsInRegion(choice, region) : null, choice);
    list.mark();
  };
  const redraw = () => {
    const choice = choiceOf(data, state);
    choosers.show(choice);
    scatter.draw(choice);
    quadrants.draw(choice);
    showList();
  };
  listenToPoints(scatter, state, choose);
  listenToPlotKeys(scatter, state, choose, chooseQuadrant);
  listenToHandles(scatter, state);
  return { scatter, choosers, list, quadrants, showList, redraw };
};

define("regimes", ({ box, data, state }) => {
  const { text } = data;
  const { scatter, choosers, list, quadrants, showList, redraw } = makeParts(data, state);
  const chips = groupChips(data, state);
  const spoken = liveRegion();
  const bar = make("div", "opd-bar opd-regimes-bar");
  const both = make("div", "opd-both");
  bar.append(choosers.node, chips.node);
  both.append(scatter.stage, quadrants.node);
  box.append(...titleOf(data), bar, both, quadrants.note, list.head, list.node, spoken);

  /** @param {number} row */
  const speak = (row) => {
    if (row < 0 || row >= text.index.length) return;
    const { x, y } = scatter.choice();
    const values = `${x.label} ${number(x.values[row])}, ${y.label} ${number(y.values[row])}`;
    spoken.textContent = `${wordAt(text, row)}, ${values}`;
  };
  const changeAxis = () => {
    state.set("region", []);
    redraw();
  };
  const regroup = () => {
    chips.draw();
    redraw();
  };
  state.on("x", changeAxis);
  state.on("y", changeAxis);
  state.on("by", () => {
    state.set("hidden", []);
    regroup();
  });
  state.on("hidden", regroup);
  state.on("thresholds", () => {
    quadrants.draw(scatter.choice());
    scatter.showLines();
  });
  state.on("region", (region) => {
    scatter.showRegion(region);
    showList();
  });
  state.on("selected", (row) => {
    scatter.showRing("selected");
    list.mark();
    speak(row);
  });
  state.on("hovered", () => scatter.showRing("hovered"));
  regroup();
  return watchWidth(scatter.stage, scatter.width, redraw);
});
