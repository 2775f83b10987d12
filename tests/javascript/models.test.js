// The model functions of the pages' scripts, which need no browser.
import assert from "node:assert/strict";
import { test } from "node:test";

import { crowdedColumns, roundTicks } from "../../opdlab/viz/static/dots.js";
import { byPrompt, nearestKept } from "../../opdlab/viz/static/board.js";
import { resultOf, signOfScore } from "../../opdlab/viz/static/branches.js";
import { orderOfGroups, rowsOfGroups } from "../../opdlab/viz/static/disagreements.js";
import {
  agreementText,
  exactNumber,
  namesOf,
  takenBranches,
  writeFormula,
} from "../../opdlab/viz/static/equation.js";
import { agreementOf, toggled } from "../../opdlab/viz/static/lens.js";
import { changeSince } from "../../opdlab/viz/static/scrubber.js";
import { channelOfMarks, chosenRange, markAt, withMark } from "../../opdlab/viz/static/marks.js";
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
import { nextApart, rowsOfRule, setsOf, setTable } from "../../opdlab/viz/static/two_rules.js";
import { matchesOf, searchIndex } from "../../opdlab/viz/static/tools.js";
import { largestInWords } from "../../opdlab/viz/static/why.js";

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

test("a formula keeps the brackets that it needs", () => {
  const name = (text) => ["name", text];
  const nameOf = (text) => text;
  const minus = ["-", name("a"), ["-", name("b"), name("c")]];
  assert.equal(writeFormula(minus, nameOf), "a − (b − c)");
  assert.equal(writeFormula(["*", ["+", name("a"), name("b")], name("c")], nameOf), "(a + b) · c");
  assert.equal(
    writeFormula(["neg", name("a")], () => "−2"),
    "−(−2)",
  );
  assert.equal(writeFormula(["exp", ["neg", name("a")]], nameOf), "exp(−a)");
  const sum = ["sum", ["*", name("p"), name("a")]];
  assert.equal(writeFormula(sum, nameOf), "Σ [p · a]");
  const rule = ["where", ["==", name("a"), ["number", 2]], name("b"), ["neg", sum]];
  assert.equal(
    writeFormula(
      takenBranches(rule, () => 2),
      nameOf,
    ),
    "b",
  );
  assert.equal(
    writeFormula(
      takenBranches(rule, () => 1),
      nameOf,
    ),
    "−Σ [p · a]",
  );
  assert.deepEqual(
    takenBranches(rule, () => NaN),
    rule,
  );
  const terms = (term) => ["0.5", "0.2"].map((p) => writeFormula(term, (n) => (n === "p" ? p : n)));
  assert.equal(writeFormula(sum, nameOf, terms), "[0.5 · a + 0.2 · a + …]");
  assert.deepEqual(namesOf(sum), ["p", "a"]);
  assert.deepEqual(
    [0, 0.25, -1.7e-5].map((x) => exactNumber(x)),
    ["0", "0.25", "−1.7e−5"],
  );
  assert.equal(agreementText(1, 1.0001, false), "as recorded");
  assert.match(agreementText(1, 2, false), /not the same/);
  assert.match(agreementText(1, 2, true), /kept tokens/);
  assert.equal(agreementText(NaN, 2, false), "");
});

test("groups of disagreements keep their rows in any order", () => {
  const groups = [
    { count: 1, share: 0.5 },
    { count: 3, share: 0.3 },
    { count: 3, share: 0.2 },
  ];
  assert.deepEqual(rowsOfGroups(groups, [7, 1, 2, 3, 4, 5, 6]), [[7], [1, 2, 3], [4, 5, 6]]);
  assert.deepEqual(orderOfGroups(groups, "share"), [0, 1, 2]);
  assert.deepEqual(orderOfGroups(groups, "count"), [1, 2, 0]);
});

test("two rules part the tokens into four sets", () => {
  const data = {
    axes: [axis([1, 5, NaN, 9])],
    kinds: [{ key: "kind", label: "kind", names: ["x", "y"], values: [0, 1, 0, -1] }],
    own: [1, 1, 1, 0],
    first: 1,
    size: 2,
    amounts: { kl: [1, 2, 1, 4] },
  };
  data.axes[0].key = "a";
  const a = rowsOfRule(data, { key: "a", sign: ">=", value: 5 });
  const b = rowsOfRule(data, { key: "kind", sign: "=", value: "x" });
  assert.deepEqual([...a], [0, 1, 0, 1]);
  assert.deepEqual([...b], [1, 0, 1, 0]);
  const sets = setsOf(a, b);
  assert.deepEqual([...sets], [2, 1, 2, 1]);
  const table = setTable(sets, data);
  assert.deepEqual(table[1], { here: 1, all: 1, shares: [0.5] });
  assert.deepEqual(table[2], { here: 1, all: 2, shares: [0.5] });
  assert.deepEqual([...rowsOfRule(data, { key: "a", sign: "<=", value: 5 })], [1, 1, 0, 0]);
  assert.equal(nextApart(Uint8Array.of(0, 3, 1, 0), 0, 4, 2, 1), 2);
  assert.equal(nextApart(Uint8Array.of(2, 3, 1, 0), 0, 4, 2, 1), 0);
  assert.equal(nextApart(Uint8Array.of(2, 3, 1, 0), 0, 4, 0, -1), 2);
});

test("a label replaces those that it overlaps", () => {
  const mark = (sample, position, length, label) => ({
    sample,
    position,
    length,
    label,
    comment: "",
  });
  const marks = [mark(0, 1, 2, "a"), mark(1, 1, 1, "a")];
  const more = withMark(marks, mark(0, 2, 3, "b"));
  assert.deepEqual(
    more.map(({ sample, label }) => [sample, label]),
    [
      [0, "b"],
      [1, "a"],
    ],
  );
  assert.equal(markAt(more, 0, 4)?.label, "b");
  assert.equal(markAt(more, 0, 1), undefined);
  const channel = channelOfMarks([mark(0, 1, 2, "a"), mark(0, 4, 1, "b")], 6);
  assert.deepEqual([...channel.values], [-1, 0, 0, -1, 1, -1]);
  assert.deepEqual(chosenRange([5, 3], 0), { position: 3, length: 3 });
  assert.deepEqual(chosenRange([], 7), { position: 7, length: 1 });
});

test("the texts of a branch are counted where scores are verdicts", () => {
  const texts = (...scores) => scores.map((score) => ({ text: "", kl: null, score, finish: "" }));
  assert.equal(resultOf({ score: 0.5, texts: texts(1, 0) }), "1 of 2 right");
  assert.equal(resultOf({ score: 0.25, texts: texts(0.5, 0) }), "score 0.25");
  assert.equal(resultOf({ score: null, texts: texts(null) }), "not scored");
  assert.deepEqual([1, 0, 0.5, null].map(signOfScore), ["✓", "✗", "0.5", "·"]);
});

test("a step of a curve leads to the nearest kept one, by prompt", () => {
  const kept = [{ step: 0 }, { step: 20 }, { step: 40 }];
  assert.deepEqual(
    [-5, 9, 11, 99].map((at) => nearestKept(kept, at).step),
    [0, 0, 20, 40],
  );
  assert.equal(nearestKept([], 3), undefined);
  const groups = byPrompt([
    { prompt: "a", first: 1 },
    { prompt: "b", first: 2 },
    { prompt: "a", first: 3 },
  ]);
  assert.deepEqual(
    groups.map(([prompt, all]) => [prompt, all.length]),
    [
      ["a", 2],
      ["b", 1],
    ],
  );
});

test("the largest weights are told in words", () => {
  const side = { largest: [1, 0], pieces: ["a", "b"], parts: ["hint", "last"], weights: [0.5, -2] };
  assert.equal(largestInWords(side), "b (last) −2, a (hint) +0.5");
});
