"""What `tune_cpu` gives: a training step of the laptop preset with it and without, each in its own process.

python benchmarks/cpu_settings.py
"""

import multiprocessing
import statistics
import time

ROUNDS = 5


def steps(tuned: bool, queue) -> None:
    import torch

    from textok_mini.device import tune_cpu
    from textok_mini.losses import LPIPS, tokenizer_loss
    from textok_mini.settings import load_config
    from textok_mini.text import TextTokens
    from textok_mini.tokenizer import TexTok

    config, t = load_config("laptop").tokenizer, load_config("laptop").training
    torch.set_num_threads(1)
    if tuned:
        tune_cpu(config.num_patches + 26)
    model, perceptual = TexTok(config), LPIPS("alex")
    images = torch.rand(t.batch_size, 3, config.image_size, config.image_size) * 2 - 1
    mask = torch.arange(26) < torch.randint(15, 27, (t.batch_size, 1))
    text = TextTokens(torch.randn(t.batch_size, 26, config.text_dim), mask)
    optimizer, seconds = torch.optim.AdamW(model.parameters(), fused=True), []
    for _ in range(12):
        begun = time.process_time()
        tokenizer_loss(model(images, text)[0], images, {"l2": 1.0, "lpips": 0.1}, perceptual)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begun)
    queue.put(statistics.median(seconds[2:]))


if __name__ == "__main__":
    context, ratios = multiprocessing.get_context("spawn"), []
    for _ in range(ROUNDS):
        pair = []
        for tuned in (False, True):
            queue = context.Queue()
            process = context.Process(target=steps, args=(tuned, queue))
            process.start()
            pair.append(queue.get())
            process.join()
        ratios.append(pair[0] / pair[1])
        print(f"processor seconds a step: {pair[0]:.3f} as torch comes, {pair[1]:.3f} with tune_cpu")
    print(f"times as fast: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
