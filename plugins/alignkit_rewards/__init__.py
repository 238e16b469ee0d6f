"""Rewards that ship with alignkit, one file each."""

from __future__ import annotations

from alignkit import Register, hookimpl

REWARDS = {
    "aesthetic": ("aesthetic:Aesthetic", "Aesthetic rating from 1 to 10, prompt ignored: LAION's head on CLIP"),
    "attribute_binding": (
        "attribute_binding:AttributeBinding",
        "Share of objects and attributes of the prompt that a BLIP VQA model confirms (LaSRO)",
    ),
    "clip_score": ("clip_score:ClipScore", "Cosine similarity of image and prompt in CLIP"),
    "function": ("function:Function", "Any Python function, as module:function"),
    "hpsv2": ("hpsv2:HPSv2", "Human Preference Score v2, versions 2.0 and 2.1"),
    "image_reward": ("image_reward:ImageReward", "Human preference predicted by BLIP from image and prompt"),
    "jpeg_compressibility": ("jpeg:JpegCompressibility", "Minus the size of the image as a JPEG file, in kilobytes"),
    "jpeg_incompressibility": ("jpeg:JpegIncompressibility", "Size of the image as a JPEG file, in kilobytes"),
    "ocr": ("ocr:Ocr", "Similarity of the text in the image, read by GOT-OCR2, to the text quoted in the prompt"),
    "pickscore": ("pickscore:PickScore", "Human preference for the image given the prompt, from CLIP ViT-H"),
    "remote": ("remote:Remote", "A reward served over HTTP by `alignkit serve`"),
    "text_alignment": (
        "text_alignment:TextAlignment",
        "BERTScore of Florence-2's caption of the image against the prompt (LaSRO)",
    ),
    "vlm_judge": (
        "vlm_judge:VlmJudge",
        "A vision language model at an OpenAI-compatible endpoint: yes or no, rubric, VIEScore or caption",
    ),
    "vqa_score": ("vqa_score:VqaScore", "Probability of a vision language model's yes that the image shows the prompt"),
}


@hookimpl
def register_rewards(register: Register) -> None:
    for name, (target, summary) in REWARDS.items():
        register(name, f"alignkit_rewards.{target}", summary)
