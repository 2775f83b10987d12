// The state of a view: traits that its page shares with Python (where it is live) and with the other views on the page.

/** @import { Completion, Model, State, Traits } from "./types.js" */

const LINK = "opd-link"; // the event by which views of one page follow each other
/** @type {(keyof Traits)[]} */
const LINKED = ["selected", "hovered", "brush"];
const SAVE_DELAY = 60; // ms between what changes here and what Python hears
const PATIENCE = 2500; // ms after which an unanswered message means that nobody listens

/**
 * A row that means the same in every view: the completion's key and the position in it; null for no row.
 * @typedef {{ key: string, at: number } | null} Place
 */

/** @param {unknown} left @param {unknown} right */
export const equal = (left, right) => JSON.stringify(left) === JSON.stringify(right);

/**
 * Stand in for a widget's model in a page without kernel.
 * @param {Record<string, any>} traits
 * @returns {Model}
 */
export const fakeModel = (traits) => {
  const heard = new EventTarget();
  return {
    get: (name) => traits[name],
    set: (name, value) => {
      traits[name] = value;
      heard.dispatchEvent(new Event(`change:${name}`));
    },
    on: (name, act) => heard.addEventListener(name, act),
    off: (name, act) => heard.removeEventListener(name, act),
    save_changes() {},
  };
};

/** @param {Completion[]} texts @param {number} row @returns {Place} */
const placeOf = (texts, row) => {
  const text = texts.find(({ first, size }) => row >= first && row < first + size);
  return text ? { key: text.key, at: row - text.first } : null;
};

/** @param {Completion[]} texts @param {Place} place */
const rowOf = (texts, place) => {
  const text = place && texts.find(({ key }) => key === place.key);
  return text ? text.first + place.at : -1;
};

/**
 * Talk to Python: save traits a moment after they change, and ask questions. `badge(true)` hears that nobody answers.
 * @param {Model} model
 * @param {(isMute: boolean) => void} badge
 */
const pythonLink = (model, badge) => {
  const isLive = typeof model.send === "function";
  /** @type {Map<number, { done: (answer: any) => void, fail: (error: Error) => void, late: number }>} */
  const waiting = new Map();
  let timer = 0;
  let lastQuestion = 0;

  /** @param {unknown} [content] @returns {Promise<any>} */
  const ask = (content = null) =>
    new Promise((done, fail) => {
      lastQuestion += 1;
      const late = setTimeout(() => badge(true), PATIENCE);
      waiting.set(lastQuestion, { done, fail, late });
      model.send?.({ id: lastQuestion, ask: content });
    });
  // After a restart of the kernel the channel may be closed, which throws, or lead nowhere, which only an echo would tell.
  const save = () => {
    timer = 0;
    try {
      model.save_changes();
    } catch {
      badge(true);
    }
    ask().catch(() => badge(true));
  };
  const saveSoon = () => {
    if (isLive && !timer) timer = setTimeout(save, SAVE_DELAY);
  };
  /** @param {{ id: number, error?: string, answer?: unknown }} message */
  const hear = ({ id, error, answer }) => {
    const asked = waiting.get(id);
    if (!asked) return;
    waiting.delete(id);
    clearTimeout(asked.late);
    badge(false);
    if (error) asked.fail(new Error(error));
    else asked.done(answer);
  };
  const close = () => {
    for (const { late } of waiting.values()) clearTimeout(late);
    clearTimeout(timer);
  };
  return { isLive, ask, saveSoon, hear, close };
};

/**
 * Follow the other views of the page in `selected`, `hovered` and `brush`, and tell them of changes here.
 * @param {Completion[]} texts
 * @param {Pick<State, "get" | "set" | "on">} traits
 */
const pageLink = (texts, { get, set, on }) => {
  const own = {}; // tells this view's own events from those of others
  let isFollowing = false;

  /** @param {keyof Traits} name @param {any} value */
  const announce = (name, value) => {
    if (isFollowing) return;
    const places = [value].flat().map((row) => placeOf(texts, row));
    document.dispatchEvent(new CustomEvent(LINK, { detail: { own, name, places } }));
  };
  /** @param {Event} event */
  const follow = (event) => {
    const { detail } =
      /** @type {CustomEvent<{ own: object, name: keyof Traits, places: Place[] }>} */ (event);
    const { name, places } = detail;
    if (detail.own === own || get(name) === undefined) return;
    const rows = places.map((place) => rowOf(texts, place));
    const isElsewhere =
      name === "brush" ? places.length && rows.includes(-1) : places[0] && rows[0] < 0;
    if (isElsewhere) return; // of a text that is not here
    isFollowing = true;
    set(name, name === "brush" ? rows : rows[0]);
    isFollowing = false;
  };

  for (const name of LINKED) {
    if (get(name) !== undefined) on(name, (value) => announce(name, value));
  }
  document.addEventListener(LINK, follow);
  const leave = () => document.removeEventListener(LINK, follow);
  return { announce, leave };
};

/**
 * Return the state of one view.
 * @param {Model} model
 * @param {Completion[]} texts
 * @param {(isMute: boolean) => void} badge
 * @returns {State}
 */
export const connect = (model, texts, badge) => {
  const python = pythonLink(model, badge);
  /** @type {(() => void)[]} */
  const undo = [];
  /** @param {string} name @param {(message: any) => void} act */
  const listen = (name, act) => {
    model.on(name, act);
    undo.push(() => model.off(name, act));
  };
  /** @type {State["get"]} */
  const get = (name) => model.get(name);
  /** @type {State["on"]} */
  const on = (name, act) => listen(`change:${name}`, () => act(get(name)));
  /** @type {State["set"]} */
  const set = (name, value) => {
    if (equal(get(name), value)) {
      // Chosen again: nothing changes here, but other views may show another token.
      if (name === "selected") page.announce(name, value);
      return;
    }
    model.set(name, value);
    python.saveSoon();
  };

  const page = pageLink(texts, { get, set, on });
  if (python.isLive) listen("msg:custom", python.hear);
  const close = () => {
    page.leave();
    for (const act of undo) act();
    python.close();
  };
  return { get, set, on, ask: python.ask, live: python.isLive, close };
};
