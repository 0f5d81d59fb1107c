// Encode and continue with llama.cpp, by way of node-llama-cpp, on a CPU.
//
// Job: as for transformers, and `package` (the folder of node-llama-cpp), `gguf`.
// Answer: `versions`, `encoded`, `answers`.
//
// One thread: with more, sums come out in another order and near ties may turn.

import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const entry = path.join(job.package, "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const {version} = JSON.parse(fs.readFileSync(path.join(job.package, "package.json"), "utf8"));

const llama = await getLlama({gpu: false, build: "never", logLevel: "warn"});
const model = await llama.loadModel({modelPath: job.gguf});
const context = await model.createContext({
  contextSize: Math.max(...job.prompts.map((prompt) => prompt.length)) + job.max_new_tokens + 8,
  threads: 1,
  sequences: 1,
});

const begin = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
const encoded = job.texts.map((text) => [
  ...begin,
  ...model.tokenize(text, false, "trimLeadingSpace"),
]);

const sequence = context.getSequence();
const stops = new Set(job.stop_tokens);
const answers = [];
for (const prompt of job.prompts) {
  await sequence.clearHistory();
  const answer = [];
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    answer.push(token);
    if (stops.has(token) || answer.length >= job.max_new_tokens)
      break;
  }
  answers.push(answer);
}

const release = llama.llamaCppRelease.release;
fs.writeFileSync(process.argv[3], JSON.stringify({
  versions: {"node-llama-cpp": version, "llama.cpp": release},
  encoded,
  answers,
}));
process.exit(0);
