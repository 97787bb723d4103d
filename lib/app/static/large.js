function render({ model, el }) {
  const dialog = document.createElement("dialog"), close = document.createElement("button");
  const photo = document.createElement("img"), title = document.createElement("p");
  dialog.className = "large-photo";
  close.textContent = "Close";
  dialog.append(photo, title, close);
  el.append(dialog);
  const open = ({ uri, name }) => {
    dialog.setAttribute("aria-label", name);
    photo.alt = title.textContent = name;
    photo.src = uri;
    if (!dialog.open) dialog.showModal();
  };
  close.addEventListener("click", () => dialog.close());
  // Beside the photo, too.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  model.on("msg:custom", open);
  return () => model.off("msg:custom", open);
}

export default { render };
