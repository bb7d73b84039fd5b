// The explorer of real runs: what the metric becomes where one token's activation is patched or ablated.

const DONE = {
  patch: { title: "patch", text: "The corrupted run, with this one activation of the clean run", from: "corrupted" },
  ablate: { title: "ablate", text: "The clean run, with this one activation set to zero", from: "clean" },
};

function render({ model, el }) {
  const { texts, metric, runs, sweeps } = model.get("data");
  const length = texts.clean.length;

  const move = (changed) => {
    const values = { ...model.get("values"), ...changed };
    const there = sweeps[values.intervention].activations;
    if (!there.includes(values.activation)) values.activation = there[there.length - 1];
    model.set("values", values);
    model.save_changes();
    update();
  };

  /** A row of buttons of which one is on. */
  function choice(name, label, options) {
    const inputs = options.map(([value, text]) => {
      const input = element("input", { type: "radio", name, value, ...OWN_KEYS });
      input.addEventListener("change", () => move({ [name]: value }));
      return [input, element("label", {}, input, ` ${text}`)];
    });
    return {
      row: element("fieldset", {}, element("legend", {}, label), ...inputs.map(([, row]) => row)),
      set(value, allowed) {
        for (const [input] of inputs) {
          input.checked = input.value === value;
          input.disabled = !allowed.includes(input.value);
        }
      },
    };
  }
  const interventions = choice("intervention", "what to do", Object.entries(DONE).map(([name, { title }]) => [name, title]));
  const activations = choice("activation", "with which activation", sweeps.patch.activations.map((name) => [name, name]));
  const { layers } = sweeps.patch;
  const layer = slider(
    { name: "layer", label: "layer", min: 0, max: layers.length - 1, step: 1 },
    (at) => move({ layer: layers[at] }),
    (at) => `${layers[at]}`,
  );
  const position = slider(
    { name: "position", label: "position", min: 0, max: length - 1, step: 1 },
    (at) => move({ position: at }),
    (at) => `${at}, ${JSON.stringify(texts.clean[at])}`,
  );

  const margin = bars({ before: "before", after: "with it", change: "change" });
  const said = element("p", { className: "verdict", role: "status" });
  const strip = tokenStrip(texts.clean, `the clean prompt: ${texts.clean.join("")}`);
  strip.cells.forEach((cell, at) => {
    const other = texts.corrupted[at];
    if (other !== texts.clean[at]) {
      cell.classList.add("changed");
      cell.append(element("small", {}, other));
    }
  });
  const grid = element("div", { className: "grid", role: "img" });
  grid.style.gridTemplateColumns = `2.5em repeat(${length}, minmax(0, 1fr))`;
  const cells = layers.map(() => texts.clean.map(() => element("i", {})));
  [...layers.keys()].reverse().forEach((row) => grid.append(element("span", {}, `${layers[row]}`), ...cells[row]));

  /** Takes the pointer's place as the one looked at, while it is held down. */
  function pick(box, found) {
    const take = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const changed = found(document.elementFromPoint(event.clientX, event.clientY)?.closest(".token, .grid i"));
      if (changed) move(changed);
    };
    box.addEventListener("pointerdown", take);
    box.addEventListener("pointermove", take);
  }
  pick(strip.strip, (one) => strip.cells.includes(one) && { position: strip.cells.indexOf(one) });
  pick(grid, (one) => {
    const row = cells.findIndex((list) => list.includes(one));
    return row >= 0 && { layer: layers[row], position: cells[row].indexOf(one) };
  });

  const root = element(
    "section",
    { className: "hijack-lens-explorer", "aria-label": "Which token and layer carry the answer?" },
    element(
      "p",
      { className: "lead" },
      `Two runs that differ in their prompts. ${metric}: clean ${signed(runs.clean)}, corrupted ${signed(runs.corrupted)}.`,
    ),
    said,
    element("figure", {}, margin.box),
    element(
      "figure",
      {},
      element("h3", {}, "Drag over the tokens"),
      strip.strip,
      element(
        "figcaption",
        {},
        "The bluer, the more the metric rises; the more orange, the more it falls. Below a token: the corrupted prompt's.",
      ),
    ),
    element(
      "div",
      { className: "columns" },
      element("form", { className: "controls", "aria-label": "what to change" }, interventions.row, activations.row, layer.row, position.row),
      element("figure", {}, element("h3", {}, "Layer by position"), grid, element("figcaption", {}, "the last layer above")),
    ),
  );
  el.replaceChildren(root);
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());

  function update() {
    const values = model.get("values");
    const sweep = sweeps[values.intervention];
    const table = sweep.values[sweep.activations.indexOf(values.activation)];
    const before = runs[DONE[values.intervention].from];
    const row = layers.indexOf(values.layer);
    const most = Math.max(1e-9, ...sweep.values.flat(2).map((one) => Math.abs((one ?? before) - before)));
    const paint = (cell, value, here) => {
      const change = (value ?? before) - before;
      cell.style.setProperty("--share", `${(100 * Math.abs(change)) / most}%`);
      cell.classList.toggle("falls", change < 0);
      cell.classList.toggle("strong", Math.abs(change) > 0.55 * most);
      cell.classList.toggle("query", here);
      cell.title = `${signed(change)}`;
    };
    strip.cells.forEach((cell, at) => paint(cell, table[row][at], at === values.position));
    cells.forEach((list, r) =>
      list.forEach((cell, at) => paint(cell, table[r][at], r === row && at === values.position)),
    );
    const after = table[row][values.position];
    const measured = { before, after: after ?? before, change: (after ?? before) - before };
    margin.set(measured, Math.max(1e-9, most, ...sweep.values.flat(2).map((one) => Math.abs(one ?? 0)), Math.abs(before)));
    const where = `${values.activation} of layer ${values.layer} at position ${values.position}, ${JSON.stringify(texts.clean[values.position])}`;
    said.textContent = `${DONE[values.intervention].text}, ${where}: ${signed(before)} becomes ${signed(measured.after)}.`;
    grid.setAttribute("aria-label", `What each layer and position of ${values.activation} changes; ${said.textContent}`);
    interventions.set(values.intervention, Object.keys(DONE));
    activations.set(values.activation, sweep.activations);
    layer.set(row);
    position.set(values.position);
  }

  const unfollow = followTheme(root);
  model.on("change:values", update);
  update();
  return () => {
    unfollow();
    model.off("change:values", update);
  };
}
