const PIECE = 4 * 1024 * 1024;

async function send(model, file) {
  if (!file) return;
  if (file.size > model.get("most_bytes")) {
    model.send({ refused: file.size });
    return;
  }
  const content = await file.arrayBuffer();
  let start = 0;
  do {
    const piece = content.slice(start, start + PIECE);
    model.send({ start, size: content.byteLength }, undefined, [piece]);
    start += piece.byteLength;
  } while (start < content.byteLength);
}

function render({ model, el }) {
  const zone = document.createElement("label");
  zone.className = "photo-drop";
  const text = document.createElement("span");
  text.innerHTML = "<b>Drop a photo here</b><br>paste it, or <u>choose a file</u>";
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*,.heic,.heif,.hif"; // some systems do not take these for images
  zone.append(text, input);
  el.append(zone);

  // A page of its own takes photos anywhere: dropped beside the box, the browser would open them.
  const place = document.body.dataset.voila ? document.body : zone;
  const over = (event) => { event.preventDefault(); zone.classList.add("over"); };
  const leave = () => zone.classList.remove("over");
  const drop = (event) => {
    event.preventDefault();
    leave();
    send(model, event.dataTransfer.files[0]);
  };
  const paste = (event) => send(model, event.clipboardData.files[0]);
  const choose = () => { send(model, input.files[0]); input.value = ""; };
  const listeners = { dragover: over, dragleave: leave, drop, paste };
  for (const [name, listener] of Object.entries(listeners)) {
    place.addEventListener(name, listener);
  }
  input.addEventListener("change", choose);
  return () => {
    for (const [name, listener] of Object.entries(listeners)) {
      place.removeEventListener(name, listener);
    }
  };
}

export default { render };
