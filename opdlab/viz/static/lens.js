// TokenLens: the tokens of one completion coloured by a channel, further channels as tracks, a map
// of long texts and, under them, the duel of the policies at one token, beside up to three that are
// pinned.

/** @import { Channel, LensPayload, State } from "./types.js" */

import {
  clamp,
  define,
  drawLegend,
  isNamed,
  liveRegion,
  make,
  makeBar,
  makeButton,
  measure,
  moveCursor,
  number,
  promptBox,
  put,
  sum,
  titleOf,
  twoSided,
  wordAt,
} from "./core.js";
import { duelPanel } from "./duel.js";
import { mapOfLong, scrollStrip } from "./minimap.js";
import { channelButtons, tokenStrip } from "./strip.js";
import { helpList, searchField } from "./tools.js";
import { MOST_TRACKS, paintTracks, trackNames } from "./tracks.js";

const MOST_PINS = 3;
/** @type {[keys: string, meaning: string][]} */
const KEYS = [
  ["← → ↑ ↓", "go to a token"],
  ["n p", "next, previous peak"],
  ["Home End", "first, last token"],
  ["1 … 9", "choose a channel"],
  ["Shift + click", "on a channel: add a track"],
  ["Shift + ←→", "brush; so does dragging"],
  ["Enter", "pin the token (three at most)"],
  ["/", "find; Enter goes on, Shift back"],
  ["Esc", "let go of brush, then pins"],
  ["?", "this list"],
];

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return what all values agree on: the one of least size where all have one sign, else 0.
 * @param {number[]} values
 */
export const agreementOf = (values) => {
  const least = Math.min(...values.map(Math.abs));
  if (values.every((value) => value > 0)) return least;
  return values.every((value) => value < 0) ? -least : 0;
};

/**
 * Return the agreement of several ratios as a channel.
 * @param {Channel[]} ratios
 * @returns {Channel}
 */
const consensusOf = (ratios) => ({
  ...ratios[0],
  key: "",
  label: "all agree",
  values: ratios[0].values.map((_, row) => agreementOf(ratios.map(({ values }) => values[row]))),
  limit: Math.max(...ratios.map(({ limit }) => limit)),
  peaks: [],
});

/**
 * Return a brushed range in words, as in "positions 3 to 9, 7 tokens: log ratio sum −4.1, mean
 * −0.586 nats"; of categories, how many tokens of each.
 * @param {number[]} brush
 * @param {Channel} channel
 */
export const summaryOf = ([start, end = start], channel) => {
  const [from, to] = [Math.min(start, end), Math.max(start, end)];
  const values = [...channel.values.slice(from, to + 1)];
  const head = `positions ${from} to ${to}, ${values.length} tokens: ${channel.label}`;
  if (isNamed(channel)) {
    const counts = (channel.names ?? []).map((name, i) => {
      const count = values.filter((value) => value === i).length;
      return count ? `${name} ${count}` : "";
    });
    return `${head} ${counts.filter(Boolean).join(", ")}`;
  }
  const known = values.filter((value) => !Number.isNaN(value));
  const total = sum(known);
  const signed = twoSided(channel);
  const unit = channel.unit ? ` ${channel.unit}` : "";
  const mean = number(total / known.length, signed);
  return `${head} sum ${number(total, signed)}, mean ${mean}${unit}`;
};

/**
 * Return a list without an item, or with it at the end, at most `most` long.
 * @template Item
 * @param {Item[]} items
 * @param {Item} item
 * @param {number} most
 */
export const toggled = (items, item, most) =>
  items.includes(item) ? items.filter((other) => other !== item) : [...items, item].slice(-most);

/**
 * What the state says of this payload.
 * @param {LensPayload} data
 * @param {State} state
 */
const readState = ({ channels, text, policies }, state) => {
  const channelOf = (/** @type {string} */ key) => channels.find((one) => one.key === key);
  const size = text.index.length;
  const channel = () => channelOf(state.get("channel")) ?? channels[0];
  let rival = policies.find((name) => name !== "student");
  return {
    channel,
    has: (/** @type {number} */ row) => row >= 0 && row < size,
    tracks: () => state.get("tracks").flatMap((key) => channelOf(key) ?? []),
    pins: () =>
      state
        .get("pins")
        .filter((row) => row >= 0 && row < size)
        .slice(0, MOST_PINS),
    // A channel that compares with nobody leaves the rival of the one before.
    rival: () => {
      rival = channel().against || rival;
      return rival;
    },
    toggleTrack: (/** @type {string} */ key) =>
      state.set("tracks", toggled(state.get("tracks"), key, MOST_TRACKS)),
  };
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/** @param {LensPayload} data @param {State} state */
const pinCards = (data, state) => {
  const node = put(make("div", "opd-pins"), { role: "group", "aria-label": "Pinned tokens" });
  /** @type {{ holder: HTMLElement, panel: ReturnType<typeof duelPanel> }[]} */
  const cards = [];
  /** @param {number} i */
  const makeCard = (i) => {
    const holder = make("div", "opd-pin");
    const panel = duelPanel(data);
    const unpin = makeButton("opd-unpin", `pin ${i + 1} ×`);
    put(unpin, { "aria-label": `Take away pin ${i + 1}` });
    unpin.addEventListener("click", () => {
      const others = state.get("pins").filter((_, k) => k !== i);
      state.set("pins", others);
    });
    holder.append(unpin, panel.node);
    node.append(holder);
    return { holder, panel };
  };
  /** @param {number[]} rows @param {string | undefined} rival @param {Channel} channel */
  const show = (rows, rival, channel) => {
    node.hidden = !rows.length;
    while (cards.length < rows.length) cards.push(makeCard(cards.length));
    cards.forEach(({ holder, panel }, i) => {
      holder.hidden = i >= rows.length;
      if (!holder.hidden) panel.show(rows[i], rival, channel);
    });
  };
  return { node, show };
};

/**
 * Make everything that stands on the page.
 * @param {LensPayload} data
 * @param {State} state
 * @param {ReturnType<typeof readState>} now
 */
const makeParts = (data, state, now) => {
  const { channels, text, finish } = data;
  /** @type {Record<string, () => void>} */
  const acts = {}; // of keys, filled when the parts are there
  /** @param {KeyboardEvent} event */
  const keys = ({ key, shiftKey }) => {
    const channel = channels[Number(key) - 1];
    if (channel) state.set("channel", channel.key);
    else if (acts[key] && !(shiftKey && key === "Enter")) acts[key]();
    else return false;
    return true;
  };
  const strip = tokenStrip({ text, finish, state, keys, escape: () => state.set("pins", []) });
  const map = mapOfLong(strip, data.segments);
  /** @type {number[]} */
  let found = [];
  const ratios = channels.filter(({ kind }) => kind === "ratio");
  const agreed = ratios.length > 1 ? [...ratios, consensusOf(ratios)] : [];
  const drawMap = () => {
    const mapped = new Set([now.channel(), ...now.tracks(), ...agreed]);
    map?.draw([...mapped], { peaks: now.channel().peaks, found, chosen: state.get("selected") });
  };
  const search = searchField(strip, text, state, (rows) => {
    found = rows;
    drawMap();
  });
  const help = helpList(KEYS);
  acts["/"] = search.focus;
  acts["?"] = help.toggle;
  acts.Enter = () => {
    const row = state.get("selected");
    if (row >= 0) state.set("pins", toggled(now.pins(), row, MOST_PINS));
  };
  const buttons = channelButtons(
    channels,
    (i) => state.set("channel", channels[i].key),
    (i) => now.toggleTrack(channels[i].key),
  );
  if (data.left.length) {
    const words = `no room in this page: ${data.left.join(", ")}`;
    buttons.node.append(make("span", "opd-choice opd-minor opd-soft", words));
  }
  return {
    strip,
    map,
    drawMap,
    search,
    help,
    buttons,
    legend: make("div"),
    names: make("div", "opd-track-names"),
    status: put(make("div", "opd-status opd-soft"), { role: "status" }),
    panel: duelPanel(data),
    cards: pinCards(data, state),
    spoken: liveRegion(),
  };
};

/** @typedef {ReturnType<typeof makeParts>} Parts */

/** @param {Parts} parts @param {LensPayload} data */
const arrange = ({ strip, map, search, help, ...parts }, data) => {
  const tools = make("div", "opd-tools");
  tools.append(parts.names, parts.status, search.node, help.button);
  return [
    ...titleOf(data),
    promptBox(data.prompt),
    makeBar(parts.buttons.node, parts.legend),
    tools,
    help.node,
    ...(map ? [map.node] : []),
    strip.node,
    parts.panel.node,
    parts.cards.node,
    parts.spoken,
  ];
};

// ── Drawing, each part by what it depends on ─────────────────────────────────────────────────────

/**
 * @param {Parts} parts
 * @param {LensPayload} data
 * @param {State} state
 * @param {ReturnType<typeof readState>} now
 */
const drawers = (parts, { channels, text }, state, now) => {
  const { strip, legend, names, status, panel, buttons } = parts;
  /** @param {number} row */
  const showToken = (row) => {
    if (!now.has(row)) return;
    panel.show(row, now.rival(), now.channel());
    moveCursor(legend, now.channel(), now.channel().values[row]);
  };
  /** @param {number} row */
  const speak = (row) => {
    const channel = now.channel();
    const value = `${channel.label} ${measure(channel.values[row], channel)}`;
    const words = `position ${row}, ${wordAt(text, row)}, ${value}${panel.likeliest(row)}`;
    parts.spoken.textContent = words;
  };
  const showBrush = () => {
    const brush = state.get("brush");
    const isHere = brush.length > 0 && now.has(brush[0]) && now.has(brush[1] ?? brush[0]);
    status.textContent = isHere ? summaryOf(brush, now.channel()) : "";
  };
  const showPins = () => {
    for (const old of strip.node.querySelectorAll("[data-pin]")) old.removeAttribute("data-pin");
    now.pins().forEach((row, i) => put(strip.nodes[row], { "data-pin": i + 1 }));
    parts.cards.show(now.pins(), now.rival(), now.channel());
  };
  const showTracks = () => {
    const tracks = now.tracks();
    paintTracks(strip, tracks);
    names.replaceChildren(...trackNames(tracks, now.toggleTrack));
    if (tracks.length) names.prepend(make("span", "opd-soft", "tracks"));
    buttons.press(channels.indexOf(now.channel()), state.get("tracks"));
    for (const fact of panel.node.querySelectorAll(".opd-fact")) {
      const key = fact.getAttribute("data-channel") ?? "";
      fact.toggleAttribute("data-track", state.get("tracks").includes(key));
    }
    parts.drawMap();
  };
  const showChannel = () => {
    buttons.press(channels.indexOf(now.channel()), state.get("tracks"));
    strip.paint(now.channel());
    drawLegend(legend, now.channel());
    showToken(state.get("selected"));
    showPins();
    parts.drawMap();
    showBrush();
  };
  return { showToken, speak, showBrush, showPins, showTracks, showChannel };
};

define("lens", ({ box, data, state }) => {
  const now = readState(data, state);
  const parts = makeParts(data, state, now);
  const draw = drawers(parts, data, state, now);
  const { strip, map } = parts;
  box.append(...arrange(parts, data));

  if (strip.size && state.get("selected") < 0) state.set("selected", now.channel().peaks[0] ?? 0);
  state.on("channel", draw.showChannel);
  state.on("tracks", draw.showTracks);
  state.on("pins", draw.showPins);
  state.on("brush", draw.showBrush);
  state.on("selected", (row) => {
    draw.showToken(row);
    map?.mark(row);
    if (now.has(row)) draw.speak(row);
  });
  state.on("hovered", (row) => draw.showToken(row < 0 ? state.get("selected") : row));
  draw.showChannel();
  draw.showTracks();
  if (!map) return undefined;
  // Once the box has its place on the page.
  requestAnimationFrame(() => scrollStrip(strip, clamp(state.get("selected"), 0, strip.size - 1)));
  return map.close;
});
