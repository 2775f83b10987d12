// Compare: a strip for each trace on one scale, the difference of two, and the numbers of all at one token.

import {
  HUES,
  css,
  define,
  drawLegend,
  figureOf,
  kindsAt,
  make,
  measure,
  moveCursor,
  number,
  put,
  sideOf,
  twoSided,
  weightOf,
  wordOf,
} from "./core.js";
import { channelButtons, peaksIn, tokenStrip } from "./strip.js";

const CHANGED = 8;

// The second minus the first of a pair, as a channel of its own scale.
const differenceOf = (channel, names, [a, b]) => {
  const values = Float32Array.from(channel.values[a], (v, i) => v - channel.values[b][i]);
  const sizes = [...values]
    .map(Math.abs)
    .filter(Number.isFinite)
    .sort((x, y) => x - y);
  const limit =
    sizes[Math.min(sizes.length - 1, Math.floor(0.98 * sizes.length))] || sizes.at(-1) || 1;
  return {
    key: "difference",
    label: "difference",
    unit: channel.unit,
    kind: "signed",
    less: `${names[b]} higher`,
    more: `${names[a]} higher`,
    limit,
    values,
    peaks: peaksIn({ values, limit }, 0, values.length),
    names: [],
  };
};

const pickList = (names, label, chosen, choose) => {
  const node = put(make("select", "opd-pick"), { "aria-label": label });
  names.forEach((name, i) => node.append(put(make("option", "", name), { value: i })));
  node.value = String(chosen);
  node.addEventListener("change", () => choose(Number(node.value)));
  return node;
};

// One line a trace: name, a bar on the shared scale, the value.
const valueLines = (names) => {
  const node = make("div", "opd-versus-values");
  const lines = names.map((name) => {
    const line = make("div", "opd-versus-line");
    const track = make("span", "opd-versus-track");
    track.append(make("span", "opd-versus-fill"));
    line.append(make("span", "opd-versus-name", name), track, make("span", "opd-versus-number"));
    node.append(line);
    return line;
  });
  const show = (values, drawn) =>
    lines.forEach((line, k) => {
      const value = values[k];
      const channel = drawn[k];
      const share = weightOf(value, channel);
      const signed = twoSided(channel);
      const fill = line.children[1].firstChild;
      line.children[1].toggleAttribute("data-signed", signed);
      Object.assign(fill.style, {
        width: `${100 * (signed ? share / 2 : share)}%`,
        left: signed ? `${value < 0 ? 50 - 50 * share : 50}%` : "0",
        background: css(HUES[sideOf(value, channel)]),
      });
      line.children[2].textContent = figureOf(value, channel);
    });
  return { node, show };
};

const rhoTable = (names) => {
  const node = make("table", "opd-rho");
  const head = make("tr");
  // numbers as heads: names of many columns would not fit
  head.append(
    make("td"),
    ...names.map((name, k) =>
      put(make("th", "", String(k + 1)), { scope: "col", "aria-label": name, title: name }),
    ),
  );
  const cells = names.map((name, k) => {
    const line = make("tr");
    const own = names.map(() => make("td"));
    line.append(
      put(make("th", "", `${k + 1} ${name}`), { scope: "row", "aria-label": name, title: name }),
      ...own,
    );
    node.append(line);
    return own;
  });
  node.prepend(make("caption", "", "rank correlation of sizes"), head);
  const show = (rho) =>
    cells.forEach((line, i) =>
      line.forEach((cell, j) => (cell.textContent = number(rho[i * names.length + j]))),
    );
  return { node, show };
};

define("compare", ({ box, data, state }) => {
  const { names, text, channels } = data;
  const size = text.index.length;
  const legend = make("div");
  const bar = make("div", "opd-bar");
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const lower = make("div", "opd-panel opd-versus-panel");
  const here = () => channels.find((c) => c.key === state.get("channel")) ?? channels[0];
  const pair = () =>
    state.get("pair").every((k) => names[k] !== undefined) ? state.get("pair") : [1, 0];
  const of = (k) => ({ ...here(), values: here().values[k], peaks: here().peaks[k] });
  const keys = ({ key }) =>
    Boolean(channels[Number(key) - 1]) &&
    (state.set("channel", channels[Number(key) - 1].key), true);
  let change = null;

  const stripOf = (label) => {
    const strip = tokenStrip({ text, state, keys, label });
    const head = make("div", "opd-versus");
    const told = make("span", "opd-soft");
    strip.node.classList.toggle("opd-tall", size > 400);
    strip.node.classList.add("opd-versus-strip");
    return { strip, head, told };
  };
  const strips = names.map((name) => {
    const one = stripOf(`Tokens under ${name}`);
    one.head.append(make("b", "", name), one.told);
    return one;
  });
  const last = stripOf("Tokens by difference");
  const picks = [0, 1].map((k) =>
    pickList(names, k ? "subtracted" : "minuend", pair()[k], (to) => {
      state.set(
        "pair",
        pair().map((old, j) => (j === k ? to : old)),
      );
    }),
  );
  const difference = make("div");
  const values = valueLines([...names, "difference"]);
  const rho = rhoTable(names);
  const list = put(make("ol", "opd-changed"), {});
  last.head.append(
    make("b", "", "difference"),
    picks[0],
    make("span", "", "−"),
    picks[1],
    last.told,
    difference,
  );

  // One scrolls, all do: they are of one text and one width.
  const all = [...strips, last].map(({ strip }) => strip.node);
  const together = ({ target }) =>
    all.forEach(
      (node) =>
        node !== target &&
        node.scrollTop !== target.scrollTop &&
        (node.scrollTop = target.scrollTop),
    );
  for (const node of all) node.addEventListener("scroll", together);

  const look = (row) => {
    if (row < 0 || row >= size) return;
    values.show(
      [...names.map((_, k) => here().values[k][row]), change.values[row]],
      [...names.map(here), change],
    );
    word.replaceChildren(
      make("span", "opd-word", wordOf(text, text.index[row])),
      make("span", "opd-soft", `position ${row - text.texts[0].first}`),
      ...pair().flatMap((k) =>
        kindsAt(
          data.kinds.map((kind) => ({
            ...kind,
            label: `${names[k]}, ${kind.label}`,
            values: kind.values[k],
          })),
          row,
        ),
      ),
    );
    moveCursor(legend, here(), here().values[pair()[0]][row]);
    moveCursor(difference, change, change.values[row]);
  };
  const listed = (row) => {
    const item = make("li");
    const button = put(make("button", "opd-button"), { type: "button" });
    const [a, b] = pair();
    button.append(
      make("span", "opd-word", wordOf(text, text.index[row])),
      make("span", "opd-changed-by", number(change.values[row], true)),
    );
    button.append(
      make(
        "span",
        "opd-soft",
        `${figureOf(here().values[b][row], here())} → ${figureOf(here().values[a][row], here())}`,
      ),
    );
    button.addEventListener("click", () => (state.set("selected", row), last.strip.reveal()));
    item.append(button);
    return item;
  };
  const redo = () => {
    const [a, b] = pair();
    change = differenceOf(here(), names, [a, b]);
    picks.forEach((pick, k) => (pick.value = String(pair()[k])));
    last.strip.paint(change);
    drawLegend(difference, change);
    const rows = peaksIn({ values: change.values, limit: 1e-30 }, 0, size, CHANGED);
    const sizeOf = (row) => Math.abs(change.values[row]);
    const shown = rows.filter((row) => sizeOf(row) >= sizeOf(rows[0]) / 100);
    const next = rows[shown.length];
    list.replaceChildren(...shown.map(listed));
    if (!shown.length) list.append(make("li", "opd-soft", "nothing differs"));
    if (next !== undefined)
      list.append(make("li", "opd-soft", `all others by at most ${number(sizeOf(next))}`));
    look(state.get("selected"));
  };
  const recolour = () => {
    buttons.press(channels.indexOf(here()));
    const drawn = names.map((_, k) => of(k));
    drawLegend(legend, { ...here(), values: drawn.flatMap((c) => [...c.values]) });
    strips.forEach(({ strip, told }, k) => {
      strip.paint(drawn[k]);
      const real = [...drawn[k].values].filter(Number.isFinite);
      told.textContent = real.length
        ? `mean ${measure(real.reduce((x, y) => x + y, 0) / real.length, { ...here(), names: [] })}`
        : "";
    });
    rho.show(here().rho);
    redo();
  };

  const buttons = channelButtons(channels, (i) => state.set("channel", channels[i].key));
  const word = make("div", "opd-versus-word");
  const column = (title, ...nodes) => {
    const node = make("div", "opd-versus-column");
    node.append(make("div", "opd-versus-title opd-soft", title), ...nodes);
    return node;
  };
  lower.append(
    column("At the token", word, values.node),
    column("Changed most", list),
    column("Do they weigh the same tokens?", rho.node),
  );
  bar.append(buttons.node, legend);
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    put(make("div", "opd-prompt", data.prompt), { dir: "auto" }),
    bar,
  );
  for (const { head, strip } of [...strips, last]) box.append(head, strip.node);
  box.append(lower, spoken);

  if (size && state.get("selected") < 0) state.set("selected", 0);
  state.on("channel", recolour);
  state.on("pair", redo);
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  state.on("selected", (row) => {
    look(row);
    if (row < 0 || row >= size) return;
    const said = names.map((name, k) => `${name} ${figureOf(here().values[k][row], here())}`);
    spoken.textContent = `position ${row}, ${wordOf(text, text.index[row])}, ${here().label}: ${said.join(", ")}`;
  });
  recolour();
});
