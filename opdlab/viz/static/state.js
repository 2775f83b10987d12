// The state of a view: traits that its page shares with Python (where it is live) and with the other views on the page.
//
// state.get(name) · state.set(name, value) · state.on(name, act) · state.live · await state.ask(question) (live only)

const LINK = "opd-link";
const LINKED = ["selected", "hovered", "brush"];
const WAIT = 60; // ms between what changes here and what Python hears
const PATIENCE = 2500; // ms after which an unanswered message means that nobody listens

export const equal = (a, b) => JSON.stringify(a) === JSON.stringify(b);

// What stands in for a widget's model in a page without kernel.
export const fakeModel = (traits, heard = new EventTarget()) => ({
  get: (name) => traits[name],
  set: (name, value) => ((traits[name] = value), heard.dispatchEvent(new Event(`change:${name}`))),
  on: (name, act) => heard.addEventListener(name, act),
  off: (name, act) => heard.removeEventListener(name, act),
  save_changes() {},
});

// Rows as (completion, position), which mean the same in every view; null for a row of none.
const placeOf = (texts, row) => {
  const text = texts.find(({ first, size }) => row >= first && row < first + size);
  return text ? { key: text.key, at: row - text.first } : null;
};

const rowOf = (texts, place) => {
  const text = place && texts.find(({ key }) => key === place.key);
  return text ? text.first + place.at : -1;
};

export const connect = (model, texts, badge) => {
  const own = {};
  const offs = [];
  const waiting = new Map();
  const live = typeof model.send === "function";
  let following = false;
  let timer = 0;
  let question = 0;
  const listen = (name, act) => (model.on(name, act), offs.push(() => model.off(name, act)));
  const on = (name, act) => listen(`change:${name}`, () => act(model.get(name)));

  const ask = (content = null) =>
    new Promise((done, fail) => {
      const id = ++question;
      const late = setTimeout(() => badge(true), PATIENCE);
      waiting.set(id, { done, fail, late });
      model.send({ id, ask: content });
    });
  // After a restart of the kernel the channel may be closed, which throws, or lead nowhere, which only an echo would tell.
  const save = () => {
    clearTimeout(timer);
    timer = 0;
    try {
      model.save_changes();
    } catch {
      badge(true);
    }
    if (live) ask().catch(() => badge(true));
  };
  const set = (name, value) => {
    if (equal(model.get(name), value)) return;
    model.set(name, value);
    if (live && !timer) timer = setTimeout(save, WAIT);
  };

  const announce = (name, value) => {
    if (following) return;
    const places = [value].flat().map((row) => placeOf(texts, row));
    document.dispatchEvent(new CustomEvent(LINK, { detail: { own, name, places } }));
  };
  const follow = ({ detail: { own: from, name, places } }) => {
    if (from === own || model.get(name) === undefined) return;
    const rows = places.map((place) => rowOf(texts, place));
    if (name === "brush" ? places.length && rows.includes(-1) : places[0] && rows[0] < 0) return; // of a text that is not here
    following = true;
    set(name, name === "brush" ? rows : rows[0]);
    following = false;
  };
  const hear = (message) => {
    const asked = waiting.get(message.id);
    if (!asked) return;
    waiting.delete(message.id);
    clearTimeout(asked.late);
    badge(false);
    if (message.error) asked.fail(new Error(message.error));
    else asked.done(message.answer);
  };

  for (const name of LINKED)
    if (model.get(name) !== undefined) on(name, (value) => announce(name, value));
  document.addEventListener(LINK, follow);
  if (live) listen("msg:custom", hear);
  const close = () => {
    document.removeEventListener(LINK, follow);
    for (const off of offs) off();
    for (const { late } of waiting.values()) clearTimeout(late);
    clearTimeout(timer);
  };
  return { get: (name) => model.get(name), set, on, ask, live, close };
};
