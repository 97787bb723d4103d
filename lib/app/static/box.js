const HELP = "The photo that is searched with. Drag a box on it to search for that part; or press "
  + "Enter for the middle, arrows to move the box, Shift and arrows to resize it, Escape for the "
  + "whole photo.";
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function render({ model, el }) {
  const make = (kind, name) => Object.assign(document.createElement(kind), { className: name });
  const zone = make("div", "photo-box"), frame = make("div", "frame"), mark = make("div", "mark");
  const photo = make("img", ""), hint = make("p", "hint"), whole = make("button", "whole");
  frame.tabIndex = 0;
  frame.setAttribute("role", "application"); // so that a screen reader hands over the arrow keys
  frame.setAttribute("aria-label", HELP);
  frame.dataset.lmSuppressShortcuts = true; // JupyterLab's, for the arrow keys
  photo.alt = "The photo that is searched with";
  photo.draggable = false;
  hint.textContent = "Drag on the photo to search for a part of it.";
  whole.textContent = "Whole photo";
  frame.append(photo, mark);
  zone.append(frame, hint, whole);
  el.append(zone);

  let box = [], before = [], start = null, timer = 0, source = null;
  const sides = () => model.get("sides"), least = model.get("least");

  function draw(shown) {
    const [width, height] = sides();
    const [x0, y0, x1, y1] = (box = shown);
    mark.hidden = whole.hidden = !box.length;
    hint.hidden = !mark.hidden;
    const style = { left: x0 / width, top: y0 / height, width: (x1 - x0) / width,
      height: (y1 - y0) / height };
    for (const [edge, share] of Object.entries(style)) mark.style[edge] = `${100 * share}%`;
  }
  function choose(chosen, wait = 0) {
    draw(chosen);
    clearTimeout(timer);
    timer = setTimeout(() => { timer = 0; model.send({ box }); }, wait);
  }
  function place({ clientX, clientY }) {
    const { left, top, width, height } = photo.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / height].map((share, i) =>
      Math.round(Math.min(Math.max(share, 0), 1) * sides()[i]));
  }
  function dragged(event) {
    const end = place(event), low = (i) => Math.min(start[i], end[i]);
    const high = (i) => Math.max(start[i], end[i]);
    // Less than five pixels of the screen are a click of an unsteady hand.
    const scale = 5 / photo.getBoundingClientRect().width;
    const wide = [0, 1].every((i) => high(i) - low(i) >= Math.max(least, scale * sides()[0]));
    return wide ? [low(0), low(1), high(0), high(1)] : [];
  }
  function moved([dx, dy], resize) {
    const [width, height] = sides(), [x0, y0, x1, y1] = box;
    const within = (value, low, high) => Math.min(Math.max(value, low), high);
    dx = Math.round(dx * Math.max(width / 20, 1));
    dy = Math.round(dy * Math.max(height / 20, 1));
    if (resize)
      return [x0, y0, within(x1 + dx, x0 + least, width), within(y1 + dy, y0 + least, height)];
    dx = within(dx, -x0, width - x1);
    dy = within(dy, -y0, height - y1);
    return [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
  }

  frame.addEventListener("pointerdown", (event) => {
    if (event.button || !event.isPrimary) return;
    frame.setPointerCapture(event.pointerId);
    [start, before] = [place(event), box];
  });
  frame.addEventListener("pointermove", (event) => start && draw(dragged(event)));
  frame.addEventListener("pointerup", (event) => {
    if (!start) return;
    const drawn = dragged(event);
    start = null;
    if (drawn.length || before.length) choose(drawn);
  });
  frame.addEventListener("pointercancel", () => { start = null; draw(before); });
  frame.addEventListener("keydown", (event) => {
    const [width, height] = sides();
    if (event.key === "Enter")
      choose([width / 4, height / 4, (3 * width) / 4, (3 * height) / 4].map(Math.round), 300);
    else if (event.key === "Escape" && box.length) choose([]);
    else if (event.key in MOVES && box.length)
      choose(moved(MOVES[event.key], event.shiftKey), 300); // one search, after the last key
    else return;
    event.preventDefault();
  });
  whole.addEventListener("click", () => { choose([]); frame.focus(); });

  function update() {
    if (source !== model.get("picture")) {
      photo.src = source = model.get("picture");
      zone.hidden = !source;
      clearTimeout(timer); // a box on the photo before
      start = timer = 0;
    }
    if (!timer && !start) draw(model.get("box"));
  }
  const news = "change:picture change:sides change:box";
  model.on(news, update);
  update();
  return () => { clearTimeout(timer); model.off(news, update); };
}

export default { render };
