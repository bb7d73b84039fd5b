// The explorer of the theory: sliders, the margin by memory, both heads' attention, the phase diagram.

const GROUPS = {
  "The prompt": {
    repeats: { label: "repeats", hint: "how often the context says c after q", kind: "context" },
    length: { label: "length", hint: "tokens in the prompt" },
    distance: { label: "distance", hint: "from the last q that c follows to the q at the end" },
  },
  "The weights' memory": {
    preference: { label: "preference", hint: "log π(g|q) − log π(c|q)", kind: "weights" },
    bigram: { label: "bigram strength", hint: "what the bigram memory writes is scaled by it", kind: "weights" },
  },
  "The context's memory": {
    copy: { label: "copy strength", hint: "b3: the logit of a token attended to fully", kind: "context" },
    match: { label: "match strength", hint: "b2: the induction head's score for a match", kind: "context" },
    previous_token: {
      label: "previous-token strength",
      hint: "b1: the previous-token head's score for the token before",
      kind: "context",
    },
  },
};
const COUNTS = ["repeats", "length", "distance"];

const times = (x) => (x < 9.95 ? x.toFixed(1) : x < 1e4 ? Math.round(x).toLocaleString("en") : x.toExponential(0));
const WRITTEN = {
  preference: (x) => `${x.toFixed(1)} (g ${times(Math.exp(x))} × likelier)`,
  bigram: (x) => x.toFixed(2),
  copy: (x) => x.toFixed(1),
  match: (x) => x.toFixed(1),
  previous_token: (x) => x.toFixed(1),
};

/** Values that go together once one of them has moved: the prompt grows if it may, then the others give way. */
function fitted(values, moved, longest) {
  const fits = { ...values };
  const missing = () => Math.max(0, 2 * fits.repeats + fits.distance - fits.length - 1);
  if (moved !== "length") fits.length = Math.min(fits.length + missing(), longest);
  if (moved !== "distance") fits.distance = Math.max(fits.distance - missing(), 2);
  fits.repeats = Math.min(fits.repeats, mostRepeats(fits));
  return fits;
}

/** Who wins, and from how many repeats on the context does. */
function verdict(total, winning) {
  const by = Math.abs(total).toFixed(2);
  const now = total > 0 ? `The context wins: after q the model says c, by ${by} logits.` : `The weights win: after q the model says g, by ${by} logits.`;
  if (!winning.length) return [now, "At this length, no number of repeats would do."];
  const lost = winning.findIndex((n, i) => i && n > winning[i - 1] + 1);
  const until = lost > 0 ? `, and again loses with ${winning[lost - 1] + 1}` : "";
  return [now, winning[0] ? `The context wins from ${winning[0]} repeat${winning[0] > 1 ? "s" : ""} on${until}.` : "It would without any repeat."];
}

/** The phase diagram: for each number of repeats, up to which preference the context wins; and where we are. */
function phaseDiagram(ranges, move) {
  const NS = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(NS, "svg");
  drawing.setAttribute("role", "img");
  const [left, right, top, bottom, height] = [42, 8, 22, 40, 260];
  const highest = ranges.preference.max;
  let columns = 1;
  let width = 400;
  const x = (n) => left + ((n + 0.5) * (width - left - right)) / columns;
  const y = (preference) => top + ((highest - clamp(preference, 0, highest)) * (height - top - bottom)) / highest;
  const add = (tag, attributes, text = "") => {
    const made = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    drawing.append(made);
  };
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = drawing.getBoundingClientRect();
    const [across, down] = [event.clientX - box.left, event.clientY - box.top];
    const repeats = Math.floor(((across - left) * columns) / (width - left - right));
    const preference = highest * (1 - (down - top) / (height - top - bottom));
    const step = ranges.preference.step;
    move({
      repeats: clamp(repeats, 0, columns - 1),
      preference: Number((Math.round(clamp(preference, 0, highest) / step) * step).toFixed(4)),
    });
  };
  drawing.addEventListener("pointerdown", (event) => {
    drawing.setPointerCapture(event.pointerId);
    drag(event);
  });
  drawing.addEventListener("pointermove", drag);
  return {
    drawing,
    draw(values, winning) {
      const pull = pulls(values);
      columns = Math.min(pull.length, ranges.repeats.max + 1);
      width = Math.max(260, Math.round(drawing.parentNode.clientWidth));
      drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
      drawing.replaceChildren();
      const wide = x(1) - x(0);
      add("rect", { class: "weights-win", x: left, y: top, width: wide * columns, height: height - top - bottom });
      const levels = pull.slice(0, columns).map((one) => y(values.bigram ? one / values.bigram : one > 0 ? highest : 0));
      const outline = levels.map((level, n) => `${n ? "L" : "M"}${x(n) - wide / 2} ${level}H${x(n) + wide / 2}`).join("");
      add("path", { class: "context-wins", d: `${outline}V${height - bottom}H${left}Z` });
      add("path", { class: "boundary", d: outline });
      for (let n = 0; n < columns; n += Math.ceil(columns / Math.floor(width / 40))) {
        add("text", { x: x(n), y: height - bottom + 15, "text-anchor": "middle" }, n);
      }
      for (let level = 0; level <= highest; level += highest / 4) {
        add("text", { x: left - 6, y: y(level) + 4, "text-anchor": "end" }, level.toFixed(highest % 4 ? 1 : 0));
      }
      add("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "repeats in the context");
      const mid = (top + height - bottom) / 2;
      add("text", { x: 12, y: mid, "text-anchor": "middle", transform: `rotate(-90 12 ${mid})` }, "preference for g");
      const free = levels.slice(-Math.ceil(130 / wide)); // where the labels would stand, at the right
      const end = { class: "region", x: width - right - 8, "text-anchor": "end" };
      if (Math.min(...free) > top + 24) add("text", { ...end, y: top + 17 }, "the weights win");
      if (Math.max(...free) < height - bottom - 24) add("text", { ...end, y: height - bottom - 8 }, "the context wins");
      if (winning.length && winning[0] < columns) {
        const at = x(winning[0]) - wide / 2;
        add("line", { class: "flip", x1: at, x2: at, y1: top, y2: height - bottom });
        const side = at > width * 0.7 ? "end" : "start";
        add("text", { class: "flip-label", x: side === "end" ? at + 4 : at - 4, y: top - 7, "text-anchor": side }, `flips at ${winning[0]}`);
      }
      const wins = winning.includes(values.repeats) ? "context" : "weights";
      add("circle", { class: `point ${wins}`, cx: x(values.repeats), cy: y(values.preference), r: 7 });
      const boundary = values.bigram ? (pull[values.repeats] / values.bigram).toFixed(2) : "any preference";
      drawing.setAttribute(
        "aria-label",
        `Phase diagram. With ${values.repeats} repeats the context wins up to a preference of ${boundary}; it is ${values.preference}.`,
      );
    },
  };
}

function render({ model, el }) {
  const { ranges } = model.get("data");
  const memories = Object.assign({}, ...Object.values(GROUPS));
  let from = null; // the position that the previous-token head is looked at from; null follows the last c

  const move = (changed, moved = "repeats") => {
    model.set("values", fitted({ ...model.get("values"), ...changed }, moved, ranges.length.max));
    model.save_changes();
    update();
  };

  const sliders = {};
  const fieldsets = Object.entries(GROUPS).map(([title, members]) => {
    for (const [name, about] of Object.entries(members)) {
      sliders[name] = slider({ name, ...about, ...ranges[name] }, (value) => move({ [name]: value }, name), WRITTEN[name]);
    }
    return element("fieldset", {}, element("legend", {}, title), ...Object.keys(members).map((name) => sliders[name].row));
  });
  const position = slider(
    { name: "position", label: "from position", min: 1, max: 2, step: 1, hint: "where the previous-token head looks from" },
    (value) => {
      from = value;
      update();
    },
  );

  const [now, flips] = [element("strong"), element("span", { className: "flips" })];
  const margin = bars({ context: "context", weights: "weights", total: "total" });
  const heads = element("div");
  const phases = phaseDiagram(ranges, move);
  const figure = (title, text, ...shown) =>
    element("figure", {}, element("h3", {}, title), ...shown, element("figcaption", {}, ...text));

  const root = element(
    "section",
    { className: "hijack-lens-explorer", "aria-label": "Which memory writes the next token?" },
    element(
      "p",
      { className: "lead" },
      "The context has said ",
      element("b", { className: "context" }, "c"),
      " after q. The weights have learned ",
      element("b", { className: "weights" }, "g"),
      " after q. Here is q again: which comes next?",
    ),
    element("p", { className: "verdict", role: "status" }, now, " ", flips),
    figure("Margin by memory", ["logit c − logit g, and what each memory adds to it"], margin.box),
    element(
      "div",
      { className: "columns" },
      element("form", { className: "controls", "aria-label": "what to change" }, ...fieldsets),
      element(
        "div",
        {},
        figure("Phase diagram", ["Drag the point, or use the sliders."], phases.drawing),
        figure("What the heads attend to", ["The bluer, the more attention; each row sums to 1."], heads, position.row),
      ),
    ),
  );
  el.replaceChildren(root);
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());

  function drawHeads(tokens, values) {
    const last = tokens.length;
    const found = tokens.lastIndexOf("c") + 1;
    if (from > last) from = null;
    const query = from ?? (found || last);
    const rows = [
      ["Induction head", last, inductionRow(tokens, last, values), (row) => `${shareOn("c", row).toFixed(2)} on c`],
      [
        "Previous-token head",
        query,
        previousTokenRow(query, values),
        (row) => (query > 1 ? `${row[query - 2].toFixed(2)} on ${tokens[query - 2]}, the token before` : "itself alone"),
      ],
    ];
    const shareOn = (token, row) => row.reduce((sum, weight, s) => sum + (tokens[s] === token) * weight, 0);
    heads.replaceChildren(
      ...rows.map(([title, at, row, where]) => {
        const says = `from ${tokens[at - 1]} at ${at}: ${where(row)}`;
        const { strip, cells } = tokenStrip(tokens, `${title}, ${says}`);
        cells.forEach((cell, s) => {
          cell.style.setProperty("--share", `${100 * (row[s] ?? 0)}%`);
          cell.title = `position ${s + 1}: ${(row[s] ?? 0).toFixed(4)}`;
          cell.classList.toggle("strong", row[s] > 0.55);
          cell.classList.toggle("query", s === at - 1);
          cell.classList.toggle("future", s >= at);
        });
        return element("div", { className: "head" }, element("b", {}, title), ` ${says}`, strip);
      }),
    );
    position.set(query, last);
  }

  function update() {
    const values = model.get("values");
    const tokens = promptOf(values);
    const winning = winningRepeats(values);
    for (const [name, one] of Object.entries(sliders)) one.set(values[name]);
    const split = marginOf(tokens, values);
    margin.set(split, Math.max(1, values.copy, values.bigram * values.preference));
    [now.textContent, flips.textContent] = verdict(split.total, winning);
    now.className = split.total > 0 ? "context" : "weights";
    flips.dataset.value = winning[0] ?? "";
    drawHeads(tokens, values);
    phases.draw(values, winning);
  }

  const unfollow = followTheme(root);
  model.on("change:values", update);
  const resized = new ResizeObserver(update);
  resized.observe(phases.drawing.parentNode);
  return () => {
    unfollow();
    resized.disconnect();
    model.off("change:values", update);
  };
}
