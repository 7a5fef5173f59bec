// The explorer: draws an image and its map, and says in words what they show.
"use strict";

const data = JSON.parse(document.getElementById("maps").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const colours = bytes(data.colours); // of the map, 256 times red, green, blue
const form = document.getElementById("explorer");
const element = (id) => document.getElementById(id);
const chosen = (name) => Number(form.elements[name].value);
const percent = (share) => (share < 0.005 ? "under 1\u00a0%" : `${Math.round(100 * share)}\u00a0%`);
const best = (values) => values.indexOf(Math.max(...values));
const isRight = (image) => image.answers.every((answer) => best(answer.shares) === image.label);

// --- the choices --------------------------------------------------------------------------

function addRadio(parent, name, value, text, picture) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name, value });
  label.append(input);
  if (picture) {
    input.setAttribute("aria-label", text);
    label.append(Object.assign(document.createElement("img"), { src: picture, alt: "" }));
    label.title = text;
  } else {
    label.append(Object.assign(document.createElement("span"), { textContent: ` ${text}` }));
  }
  parent.append(label);
}

function addChoices() {
  data.networks.forEach((network, i) => addRadio(element("networks"), "network", i, network.name));
  const most = Math.max(...data.networks.map((network) => network.layers.length));
  for (let i = 0; i < most; i++) addRadio(element("layers"), "layer", i, "");
  data.images.forEach((image, i) => {
    const text = `image ${image.number}: ${data.classes[image.label]}`;
    const parent = element(isRight(image) ? "right" : "wrong");
    addRadio(parent, "image", i, text, `data:image/png;base64,${image.pixels}`);
  });
  ["predicted", "true", ...data.classes.keys()].forEach((value) => {
    element("class").append(new Option("", value));
  });
  const start = { network: Math.min(1, data.networks.length - 1), layer: 0 };
  start.image = Math.max(0, data.images.findIndex((image) => !isRight(image)));
  for (const [name, value] of Object.entries(start)) {
    form.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
  }
}

// Say what a choice means for the image and network: only texts change, so the focus stays.
function updateChoices(network, shares, label) {
  element("layers").querySelectorAll("span").forEach((span, i) => {
    const { name, size } = network.layers[i];
    span.textContent = ` ${name} (${size.join(" × ")})`;
  });
  const named = (k) => `${data.classes[k]} (${percent(shares[k])})`;
  const [predicted, truth, ...others] = element("class").options;
  predicted.text = `the predicted one: ${named(best(shares))}`;
  truth.text = `the true one: ${named(label)}`;
  others.forEach((option, k) => { option.text = named(k); });
}

// --- the picture --------------------------------------------------------------------------

// The map's value at a point given in cells: between their centres if `smooth`, else the cell's.
function valueAt(map, [height, width], y, x, smooth) {
  if (!smooth) return map[Math.floor(y) * width + Math.floor(x)];
  const inside = (value, size) => Math.min(Math.max(value, 0), size - 1);
  const [top, left] = [inside(y - 0.5, height), inside(x - 0.5, width)];
  const [row, column] = [Math.floor(top), Math.floor(left)];
  const [below, right] = [inside(row + 1, height), inside(column + 1, width)];
  const between = (i, j, share) => i + share * (j - i);
  const upper = between(map[row * width + column], map[row * width + right], left - column);
  const lower = between(map[below * width + column], map[below * width + right], left - column);
  return between(upper, lower, top - row);
}

function blend(canvas, map, size, share, smooth) {
  const context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const y = (Math.floor(i / 4 / canvas.width) + 0.5) / canvas.height;
    const x = ((i / 4) % canvas.width + 0.5) / canvas.width;
    const level = 3 * Math.round(valueAt(map, size, y * size[0], x * size[1], smooth));
    for (let c = 0; c < 3; c++) {
      pixels.data[i + c] += share * (colours[level + c] - pixels.data[i + c]);
    }
  }
  context.putImageData(pixels, 0, 0);
}

function drawImage(canvas, picture) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
}

function drawScale() {
  const context = element("scale").getContext("2d");
  for (let level = 0; level < 256; level++) {
    context.fillStyle = `rgb(${colours.slice(3 * level, 3 * level + 3).join()})`;
    context.fillRect(level, 0, 1, 1);
  }
}

// --- the words ----------------------------------------------------------------------------

function place(map, [height, width]) {
  const maximum = best([...map]);
  if (map[maximum] === 0) return "The map is zero everywhere: no evidence for it in this layer.";
  const [row, column] = [Math.floor(maximum / width), maximum % width];
  const third = (at, size) => Math.floor((3 * (at + 0.5)) / size);
  const words = [["top", "", "bottom"][third(row, height)], ["left", "", "right"][third(column, width)]];
  const side = words.filter(Boolean).join(" ");
  const cell = `row ${row + 1} of ${height}, column ${column + 1} of ${width}`;
  return `The map's maximum lies ${side ? `at the ${side}` : "in the middle"} (${cell}).`;
}

function say(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

function show() {
  const image = data.images[chosen("image")];
  const network = data.networks[chosen("network")];
  const { shares, maps } = image.answers[chosen("network")];
  updateChoices(network, shares, image.label);
  const predicted = best(shares);
  const special = { predicted, true: image.label };
  const wanted = element("class").value;
  const explained = wanted in special ? special[wanted] : Number(wanted);
  const { name: layer, size } = network.layers[chosen("layer")];
  const cells = size[0] * size[1];
  const map = bytes(maps[chosen("layer")]).subarray(explained * cells, (explained + 1) * cells);

  const verdict = predicted === image.label ? "which is right" : "which is wrong";
  const [truth, answer, name] = [image.label, predicted, explained].map((k) => data.classes[k]);
  const text = `True class: ${truth}. ${network.name} predicts ${answer} `
    + `(${percent(shares[predicted])}), ${verdict}. Explained at ${layer}: ${name} `
    + `(${percent(shares[explained])}). ${place(map, size)}`;
  say("said", text);
  element("image").setAttribute("aria-label", `Test image ${image.number}, ${truth}`);
  element("blend").setAttribute("aria-label", `The same image under the map for ${name}`);

  const picture = form.querySelector('input[name="image"]:checked + img');
  const [share, smooth] = [element("share").value / 100, element("smooth").checked];
  ["image", "blend"].forEach((id) => drawImage(element(id), picture));
  blend(element("blend"), map, size, share, smooth);
}

addChoices();
drawScale();
form.hidden = false;
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
Promise.all([...form.querySelectorAll("img")].map((picture) => picture.decode())).then(show);
