"""Rewards that ship with alignkit, one file each."""

from __future__ import annotations

from alignkit import hookimpl
from alignkit.hookspecs import Register

REWARDS = {
    "aesthetic": ("aesthetic:Aesthetic", "Beauty from 1 to 10, whatever the prompt: LAION's head on CLIP"),
    "attribute_binding": (
        "attribute_binding:AttributeBinding",
        "Does every thing named in the prompt show its attributes? Asked of a BLIP VQA model (LaSRO)",
    ),
    "clip_score": ("clip_score:ClipScore", "How alike CLIP finds image and prompt"),
    "function": ("function:Function", "Any function of Python, as module:function"),
    "hpsv2": ("hpsv2:HPSv2", "Human Preference Score v2, versions 2.0 and 2.1"),
    "image_reward": ("image_reward:ImageReward", "What people prefer, read by BLIP from image and prompt together"),
    "jpeg_compressibility": ("jpeg:JpegCompressibility", "Minus the kilobytes of the image as JPEG"),
    "jpeg_incompressibility": ("jpeg:JpegIncompressibility", "The kilobytes of the image as JPEG"),
    "ocr": ("ocr:Ocr", "Does the image show the words that the prompt quotes? Read by GOT-OCR2"),
    "pickscore": ("pickscore:PickScore", "Which image people would pick for the prompt, on CLIP ViT-H"),
    "remote": ("remote:Remote", "A reward behind HTTP, as `alignkit serve` offers it"),
    "text_alignment": ("text_alignment:TextAlignment", "Florence-2's caption against the prompt, by BERTScore (LaSRO)"),
    "vlm_judge": (
        "vlm_judge:VlmJudge",
        "A vision language model behind an OpenAI-compatible endpoint: yes or no, a rubric, VIEScore, or its caption",
    ),
    "vqa_score": ("vqa_score:VqaScore", "How sure a vision language model is that the image shows the prompt"),
}


@hookimpl
def register_rewards(register: Register) -> None:
    for name, (target, summary) in REWARDS.items():
        register(name, f"alignkit_rewards.{target}", summary)
