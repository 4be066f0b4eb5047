// One frame of a film at a time, chosen by its slider; without this file's script all frames stand side by side.
for (const film of document.querySelectorAll(".film")) {
  const slider = film.querySelector("input");
  const name = film.querySelector("output");
  const frames = [...film.querySelectorAll("figure")].map((row) => [...row.querySelectorAll(".frame")]);
  const show = () => {
    const place = Number(slider.value);
    for (const row of frames) row.forEach((frame, index) => frame.classList.toggle("shown", index === place));
    name.value = slider.dataset.names.split("\n")[place];
    slider.setAttribute("aria-valuetext", name.value);
  };
  slider.addEventListener("input", show);
  film.classList.add("moves");
  show();
}
