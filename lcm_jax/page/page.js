// The parts of the page that draw: the canvas, the gallery and the box for a dropped PNG. Each function is called once
// with the element, the properties and the trigger of a gr.HTML; a value that it sets goes to the server with `input`.

// Rises with each request, also across tabs that share nothing but a clock.
window.lcmTicket = () => (window.lcmLast = Math.max(Date.now(), (window.lcmLast || 0) + 1));

const LCM_MAX_BYTES = 8 * 2 ** 20;

function lcmSay(text) {
  const status = document.querySelector("#status p");
  if (status) status.textContent = text;
}

function lcmReadFile(file, done) {
  if (!file) return;
  if (file.size > LCM_MAX_BYTES) return lcmSay(`${file.name} has more than 8 MiB; use a smaller file`);
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.readAsDataURL(file);
}

// --- canvas: its value is a PNG as a data URL, or "" while nothing is drawn ---

function lcmCanvas(element, props, trigger, watch) {
  const canvas = element.querySelector("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const brush = element.querySelector("[data-brush]");
  const color = element.querySelector("[data-color]");
  const swatches = [...element.querySelectorAll("[data-swatch]")];
  const cursor = { x: canvas.width / 2, y: canvas.height / 2 };
  const history = [];
  let blank = true, last = null, timer = null;

  const send = () => {
    timer = null;
    props.value = blank ? "" : canvas.toDataURL("image/png");
    trigger("input");
  };
  const sendSoon = () => { timer ??= setTimeout(send, 100); };
  const clear = () => {
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    blank = true;
  };
  const remember = () => {
    history.push({ pixels: context.getImageData(0, 0, canvas.width, canvas.height), blank });
    if (history.length > 20) history.shift();
  };
  const stroke = (from, to) => {
    context.strokeStyle = color.value;
    context.lineWidth = (brush.value / 100) * canvas.width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    blank = false;
    sendSoon();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * canvas.width,
      y: ((event.clientY - box.top) / box.height) * canvas.height,
    };
  };
  const choose = (value) => {
    color.value = value;
    swatches.forEach((each) => each.setAttribute("aria-pressed", String(each.dataset.swatch === value)));
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    stroke(last, next);
    last = next;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });

  // Arrow keys move a cursor, Space paints at it.
  const marker = element.querySelector("[data-marker]");
  const showMarker = () => {
    marker.style.left = `${(cursor.x / canvas.width) * 100}%`;
    marker.style.top = `${(cursor.y / canvas.height) * 100}%`;
  };
  canvas.addEventListener("keydown", (event) => {
    const step = canvas.width / 32;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === " ") {
      remember();
      stroke(cursor, cursor);
    } else if (moves[event.key]) {
      const [dx, dy] = moves[event.key];
      cursor.x = Math.min(canvas.width, Math.max(0, cursor.x + dx * step));
      cursor.y = Math.min(canvas.height, Math.max(0, cursor.y + dy * step));
      showMarker();
    } else return;
    event.preventDefault();
  });

  const undo = () => {
    const before = history.pop();
    if (!before) return;
    context.putImageData(before.pixels, 0, 0);
    blank = before.blank;
    send();
  };
  const fill = async (file) => {
    if (!file) return;
    try {
      const image = await createImageBitmap(file);
      const scale = Math.max(canvas.width / image.width, canvas.height / image.height);
      const [width, height] = [image.width * scale, image.height * scale];
      remember();
      context.drawImage(image, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
      image.close();
      blank = false;
      send();
    } catch {
      lcmSay(`${file.name} is not an image that this browser can open; use a PNG, JPEG or WebP file`);
    }
  };
  element.querySelector("[data-undo]").addEventListener("click", undo);
  element.querySelector("[data-clear]").addEventListener("click", () => { remember(); clear(); send(); });
  element.querySelector("[data-photo]").addEventListener("change", (event) => {
    fill(event.target.files[0]);
    event.target.value = "";
  });
  canvas.addEventListener("dragover", (event) => event.preventDefault());
  canvas.addEventListener("drop", (event) => { event.preventDefault(); fill(event.dataTransfer.files[0]); });
  swatches.forEach((each) => each.addEventListener("click", () => choose(each.dataset.swatch)));
  color.addEventListener("input", () => choose(color.value));
  watch("value", () => { if (!props.value && !blank) clear(); }); // restored settings are of an image without a drawing
  choose(color.value);
  showMarker();
  clear();
}

// --- images: every figure can be kept; a figure of the gallery can be restored ---

function lcmFigures(element) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-action]");
    if (!button) return;
    const figure = button.closest("figure");
    if (button.dataset.action === "copy") lcmCopy(figure.dataset.parameters);
    if (button.dataset.action === "keep") lcmKeep(figure);
  });
}

async function lcmCopy(text) {
  try {
    await navigator.clipboard.writeText(text);
    lcmSay("Settings copied.");
  } catch {
    lcmSay("The browser did not allow to copy; the settings are also in the PNG's metadata.");
  }
}

function lcmKeep(figure) {
  const gallery = document.querySelector("#gallery .gallery");
  const source = figure.querySelector("img").src;
  if ([...gallery.querySelectorAll("img")].some((each) => each.src === source)) return lcmSay("Kept already.");
  const kept = figure.cloneNode(true);
  kept.querySelector("[data-action=keep]").remove();
  const caption = document.createElement("p");
  caption.textContent = figure.querySelector("img").alt;
  kept.querySelector("figcaption").replaceChildren(caption);
  for (const [action, label] of [["restore", "Use settings"], ["remove", "Remove"]]) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: label, className: "small" });
    button.dataset.action = action;
    kept.querySelector(".actions").append(button);
  }
  gallery.prepend(kept);
  lcmSay("Kept in the gallery.");
}

function lcmGallery(element, props, trigger) {
  lcmFigures(element);
  element.addEventListener("click", (event) => {
    const action = event.target.closest("button[data-action]")?.dataset.action;
    const figure = event.target.closest("figure");
    if (action === "remove") figure.remove();
    if (action === "restore") trigger("click", { png: figure.querySelector("img").src });
  });
}

// --- a dropped PNG ---

function lcmDrop(element, props, trigger) {
  const box = element.querySelector("label");
  const take = (file) => lcmReadFile(file, (url) => trigger("upload", { png: url }));
  element.querySelector("input").addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = "";
  });
  box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    box.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
}
