/* The prepared requests, and whether an answer is the right one.
 *
 * The file, little-endian, as traffic.py writes it: "FPTRAF1\0", then kind, absolute, relative and count (4 bytes each);
 * for each request its length, where its id is, the length of its answer, then the bytes of both.
 */
#include "traffic.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char MAGIC[8] = "FPTRAF1";

struct Plan *plan_load(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        die("cannot read %s", path);
    long size = ftell(file);
    rewind(file);
    uint8_t *all = allocate(1, size > 0 ? (size_t)size : 1), *at = all, *end = all + size;
    if (size < 24 || fread(all, 1, (size_t)size, file) != (size_t)size || memcmp(all, MAGIC, sizeof MAGIC))
        die("%s is not a file of prepared requests", path);
    fclose(file);
    struct Plan *plan = allocate(1, sizeof *plan);
    uint32_t kind;
    memcpy(&kind, at + 8, 4);
    memcpy(&plan->absolute, at + 12, 4);
    memcpy(&plan->relative, at + 16, 4);
    memcpy(&plan->count, at + 20, 4);
    plan->kind = (enum Kind)kind;
    at += 24;
    plan->requests = allocate(plan->count, sizeof *plan->requests);
    for (uint32_t i = 0; i < plan->count; i++) {
        struct Request *request = &plan->requests[i];
        uint32_t head[3];
        if (end - at < (long)sizeof head)
            die("%s ends within request %u", path, i);
        memcpy(head, at, sizeof head);
        at += sizeof head;
        uint64_t answer = plan->kind == ROWS ? head[2] : 0;
        if ((uint64_t)(end - at) < head[0] + answer)
            die("%s ends within request %u", path, i);
        if (head[0] > FRAME)
            die("request %u has %u bytes; more than one frame of %d is not supported", i, head[0], FRAME);
        if (head[0] < 5 || (head[1] && head[1] + ID_LENGTH > head[0]) || (plan->kind == ECHO && head[2] > head[0] - 5))
            die("request %u of %s contradicts itself", i, path);
        *request = (struct Request){at, head[0], head[1], at + head[0], head[2]};
        at += head[0] + answer;
    }
    if (!plan->count)
        die("%s holds no request", path);
    return plan;
}

static bool varint(const uint8_t **at, const uint8_t *end, uint64_t *value) {
    *value = 0;
    for (int shift = 0; *at < end && shift < 64; shift += 7) {
        uint8_t byte = *(*at)++;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return false;
}

static struct Verdict check_rows(const struct Plan *plan, const struct Request *request, const uint8_t *raw,
                                 size_t length, char *problem, size_t room) {
    if (length != request->answer_length) {
        snprintf(problem, room, "%zu bytes of output, expected %u", length, request->answer_length);
        return (struct Verdict){false, false};
    }
    if (!memcmp(raw, request->answer, length))
        return (struct Verdict){true, false};
    for (size_t i = 0; i < length / sizeof(float); i++) {
        float got, expected;
        memcpy(&got, raw + i * sizeof got, sizeof got);
        memcpy(&expected, request->answer + i * sizeof expected, sizeof expected);
        /* Written so that NaN is wrong. */
        if (!(fabsf(got - expected) <= plan->absolute + plan->relative * fabsf(expected))) {
            snprintf(problem, room, "element %zu is %g, expected %g", i, (double)got, (double)expected);
            return (struct Verdict){false, false};
        }
    }
    return (struct Verdict){true, true};
}

static struct Verdict check_echo(const struct Request *request, const char *id, const uint8_t *message, size_t length,
                                 char *problem, size_t room) {
    const uint8_t *sent = request->message + 5;
    size_t id_at = request->id_at ? request->id_at - 5 : length, id_end = id_at + ID_LENGTH;
    size_t before = id_at < length ? id_at : length, within = id_end < length ? ID_LENGTH : length - before;
    bool right = length == request->answer_length && !memcmp(message, sent, before) &&
                 !memcmp(message + before, id, within) &&
                 (id_end >= length || !memcmp(message + id_end, sent + id_end, length - id_end));
    if (!right)
        snprintf(problem, room, "%zu bytes came, not the %u expected of the request", length, request->answer_length);
    return (struct Verdict){right, false};
}

struct Verdict plan_check(const struct Plan *plan, const struct Request *request, const char *id, const uint8_t *body,
                          size_t length, char *problem, size_t room) {
    const struct Verdict wrong = {false, false};
    if (length < 5 || body[0] != 0 ||
        (size_t)(body[1] << 24 | body[2] << 16 | body[3] << 8 | body[4]) != length - 5) {
        snprintf(problem, room, "%zu bytes that are not one uncompressed message", length);
        return wrong;
    }
    const uint8_t *at = body + 5, *end = body + length;
    if (plan->kind == ECHO)
        return check_echo(request, id, at, (size_t)(end - at), problem, room);
    const uint8_t *raw = NULL, *came = NULL;
    uint64_t raw_length = 0, came_length = 0, tag, size;
    unsigned raws = 0;
    while (at < end) {
        /* Every field of a ModelInferResponse has a length. */
        if (!varint(&at, end, &tag) || (tag & 7) != 2 || !varint(&at, end, &size) || size > (uint64_t)(end - at)) {
            snprintf(problem, room, "an answer that is no ModelInferResponse");
            return wrong;
        }
        if (tag >> 3 == 3) {
            came = at;
            came_length = size;
        } else if (tag >> 3 == 6) {
            raw = at;
            raw_length = size;
            raws++;
        }
        at += size;
    }
    uint64_t expected = request->id_at ? ID_LENGTH : 0;
    if (came_length != expected || (expected && memcmp(came, id, expected))) {
        snprintf(problem, room, "the id '%.*s', expected '%s'", (int)(came_length < 64 ? came_length : 64),
                 came ? (const char *)came : "", expected ? id : "");
        return wrong;
    }
    if (raws != 1) {
        snprintf(problem, room, "%u raw outputs, expected 1", raws);
        return wrong;
    }
    return check_rows(plan, request, raw, raw_length, problem, room);
}
