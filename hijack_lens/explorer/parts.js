// What both explorers are made of.

/** An HTML element with its properties (or attributes) and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "form") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** What all inputs have: in JupyterLab, keys pressed there are no shortcuts of the notebook's. */
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

const signed = (x, digits = 2) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

/** A number for readers, which holds all its digits for programs. */
function show(data, number, text) {
  data.value = number;
  data.textContent = text;
}

/** A labelled slider; `written` says its value in words. */
function slider({ name, label, hint = "", min, max, step, kind = "" }, onInput, written = String) {
  const input = element("input", { type: "range", name, min, max, step, "aria-label": label, ...OWN_KEYS });
  const said = element("output", {});
  input.addEventListener("input", () => onInput(Number(input.value)));
  return {
    row: element(
      "label",
      { className: `control ${kind}` },
      element("span", { className: "name", title: hint }, label),
      said,
      input,
    ),
    set(value, most = max) {
      input.max = most;
      input.value = value;
      said.textContent = written(value);
      input.setAttribute("aria-valuetext", said.textContent);
    },
  };
}

/** Tokens in a row that wraps, each a cell whose shade is set by `paint`. */
function tokenStrip(texts, label) {
  const cells = texts.map((text) => element("span", { className: "token" }, text));
  return { strip: element("div", { className: "strip", role: "img", "aria-label": label }, ...cells), cells };
}

/** A row for each part of a margin: its name, its bar from zero, its number. */
function bars(parts) {
  const rows = Object.entries(parts).map(([name, title]) => {
    const bar = element("i");
    const data = element("data", { className: name });
    const track = element("span", { className: "track" }, bar);
    return { name, bar, data, row: element("div", { className: `bar ${name}` }, element("span", {}, title), track, data) };
  });
  return {
    box: element("div", { className: "bars" }, ...rows.map((one) => one.row)),
    set(values, most) {
      for (const { name, bar, data } of rows) {
        const share = (50 * values[name]) / most;
        bar.style.left = `${50 + Math.min(share, 0)}%`;
        bar.style.width = `${Math.abs(share)}%`;
        show(data, values[name], signed(values[name]));
      }
    },
  };
}

/** Light or dark as the page around says (JupyterLab's and nbconvert's theme, furo's), or else the reader's system. */
function followTheme(root) {
  const around = [document.body];
  try {
    if (window.parent !== window) around.push(window.parent.document.body);
  } catch {
    // a page of another origin, which tells nothing
  }
  const schemes = { true: "light", false: "dark", light: "light", dark: "dark" };
  const follow = () => {
    const said = around.map((body) => schemes[body.dataset.jpThemeLight ?? body.dataset.theme]).find(Boolean);
    root.style.colorScheme = said ?? "light dark";
    if (document.documentElement.dataset.standsAlone) document.documentElement.style.colorScheme = root.style.colorScheme;
  };
  const observer = new MutationObserver(follow);
  for (const body of around) observer.observe(body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-theme"] });
  follow();
  return () => observer.disconnect();
}

/** Draws an explorer on a page without a kernel, and makes the frame that it may be in as high as it is. */
function standAlone(render, state) {
  const model = {
    get: (name) => state[name],
    set: (name, value) => (state[name] = value),
    save_changes() {},
    on() {},
    off() {},
  };
  document.documentElement.dataset.standsAlone = "true";
  render({ model, el: document.getElementById("explorer") });
  new ResizeObserver(() => {
    try {
      window.frameElement.style.height = `${document.documentElement.offsetHeight}px`;
    } catch {
      // no frame, or one of another origin
    }
  }).observe(document.documentElement);
}
