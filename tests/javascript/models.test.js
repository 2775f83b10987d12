// The model functions of the pages' scripts, which need no browser.
import assert from "node:assert/strict";
import { test } from "node:test";

import { crowdedColumns, roundTicks } from "../../opdlab/viz/static/dots.js";
import { agreementOf, toggled } from "../../opdlab/viz/static/lens.js";
import { changeSince } from "../../opdlab/viz/static/scrubber.js";
import { nextPeak, peaksIn } from "../../opdlab/viz/static/strip.js";
import { forkOf, rowByKey } from "../../opdlab/viz/static/timeline.js";
import { orderOf } from "../../opdlab/viz/static/rollouts.js";
import {
  quadrantSums,
  regionBetween,
  rowsInRegion,
  runsOf,
  scaleOf,
  spacedTicks,
} from "../../opdlab/viz/static/regimes_model.js";
import { matchesOf, searchIndex } from "../../opdlab/viz/static/tools.js";

const axis = (values) => ({ scale: "linear", soft: 1, ends: [0, 10], values });

const choiceOf = (valuesX, valuesY) => {
  const [x, y] = [axis(valuesX), axis(valuesY)];
  const shown = Uint8Array.from(valuesX, () => 1);
  return { x, y, scaleX: scaleOf(x), scaleY: scaleOf(y), shown };
};

test("peaks are the largest sizes, and n and p go round", () => {
  const values = [0, -5, 1, 4, NaN, 2];
  assert.deepEqual(peaksIn({ values, limit: 5 }, 0, 6, 3), [1, 3, 5]);
  assert.equal(nextPeak([1, 3, 5], 5, 1), 1);
  assert.equal(nextPeak([1, 3, 5], 1, -1), 5);
  assert.equal(nextPeak([], 2, 1), 2);
});

test("scales go there and back, and infinities lie at the ends", () => {
  for (const scale of ["linear", "log", "asinh"]) {
    const { at, of } = scaleOf({ scale, soft: 0.5, ends: [0.1, 10] });
    assert.ok(Math.abs(of(at(3)) - 3) < 1e-9);
    assert.deepEqual([at(-Infinity), at(Infinity)], [0, 1]);
  }
  assert.deepEqual(spacedTicks(axis([]), 0.15), [0, 2, 4, 6, 8, 10]);
});

test("quadrants and regions hold the tokens at their edges", () => {
  const choice = choiceOf([1, 9, 1, 9, Infinity], [9, 9, 1, 1, 5]);
  const sums = quadrantSums(choice, 5, 5, { kl: [1, 2, 3, 4, 5] });
  assert.deepEqual(sums, [
    [1, 1],
    [2, 7],
    [1, 3],
    [1, 4],
  ]);
  assert.deepEqual(rowsInRegion(choice, [5, 10, 5, 10]), [1, 4]);
  assert.deepEqual(regionBetween(choice, [1, 0.5], [0.5, 0]), [5, 10, 0, 5]);
  assert.deepEqual(runsOf([1, 2, 3, 7, 9, 10]), [1, 3, 7, 7, 9, 10]);
});

test("rollouts are filtered and sorted, those without a number last of the largest", () => {
  const table = {
    sample: new Int32Array([0, 1, 2]),
    finish: ["stop", "length", "stop"],
    reward: new Float32Array([1, NaN, 2]),
  };
  const view = { wanted: "", finish: null, sort: "-reward" };
  const texts = ["red", "green", "blue red"];
  assert.deepEqual(orderOf(table, texts, view), [2, 0, 1]);
  assert.deepEqual(orderOf(table, texts, { ...view, wanted: "RED", sort: "" }), [0, 2]);
  assert.deepEqual(orderOf(table, texts, { ...view, finish: "length" }), [1]);
});

test("a fork is the first row at the threshold, and keys stay in the texts", () => {
  const texts = [
    { first: 0, size: 3 },
    { first: 3, size: 2 },
  ];
  assert.equal(forkOf(texts[0], [0, -3, -4, 0, 0], 3), 1);
  assert.equal(forkOf(texts[1], [0, -3, -4, 0, 0], 3), -1);
  assert.equal(rowByKey("ArrowDown", texts, 0, 2), 4);
  assert.equal(rowByKey("End", texts, 1, 0), 4);
  assert.equal(rowByKey("x", texts, 1, 0), undefined);
});

test("changes since the first step, in value and towards 0", () => {
  const [values, since] = [Float32Array.of(1, -3), Float32Array.of(2, -1)];
  assert.deepEqual([...changeSince(values, since, false)], [-1, -2]);
  assert.deepEqual([...changeSince(values, since, true)], [1, -2]);
});

test("agreement, toggling, ticks, crowds, search", () => {
  assert.deepEqual(
    [
      [2, 1],
      [-2, -3],
      [1, -1],
    ].map(agreementOf),
    [1, -2, 0],
  );
  assert.deepEqual(toggled([1, 2, 3], 4, 3), [2, 3, 4]);
  assert.deepEqual(toggled([1, 2], 1, 3), [2]);
  assert.deepEqual(roundTicks(1), [0, 0.5, 1]);
  assert.deepEqual(
    crowdedColumns(
      new Map([
        [1, 7],
        [2, 6],
        [9, 5],
      ]),
    ),
    [{ from: 1, to: 2, hidden: 3 }],
  );
  const text = { index: [0, 1, 0], glyph: ["Ab", " c"], joined: [] };
  assert.deepEqual(matchesOf(searchIndex(text, 0, 3), "B CA"), [[0, 2]]);
});
