// Placeholders in filename_prefix, as in Save Image: before the front end sends the graph, it fills in
// %date:yyyy-MM-dd% and %node.widget%, but by default only for ComfyUI's own nodes.

import { app } from "../../../scripts/app.js";

const NODES = ["StoryLoom_SavePage", "StoryLoom_Consistency"];

app.registerExtension({
  name: "storyloom.FileNames",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const fill = window.comfyAPI?.utils?.applyTextReplacements; // not public: without it, placeholders stay as they are
    const prefix = node.widgets.find(({ name }) => name === "filename_prefix");
    if (fill) prefix.serializeValue = () => fill(app, prefix.value);
  },
});
