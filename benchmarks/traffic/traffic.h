/* The load generator's parts and what they share. One thread; every struct belongs to it.
 *
 *     traffic.c     options, the loop over the connections, the summary
 *     connection.c  HTTP/2 frames: requests out, answers in
 *     headers.c     header blocks, as grpcio writes them and as Go, Node and Java do
 *     requests.c    the file of prepared requests, and whether an answer is right
 */
#ifndef TRAFFIC_H
#define TRAFFIC_H

#include <nghttp2/nghttp2.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define ID_LENGTH 16     /* hexadecimal digits of a request's id */
#define MAX_STREAMS 1024 /* of one connection */
#define FRAME 16384      /* the largest frame that is sent: HTTP/2's default */

/* -- requests.c ---------------------------------------------------------------------------------------------------- */

enum Kind { ROWS = 0, ECHO = 1 }; /* what the right answer is */

struct Request {
    const uint8_t *message; /* gRPC's five bytes and a ModelInferRequest */
    uint32_t length;
    uint32_t id_at; /* where in it the id's digits are; 0: it has no id */
    const uint8_t *answer; /* ROWS: the elements of the one output, little-endian FP32 */
    uint32_t answer_length; /* ECHO: so many bytes of the request come back */
};

struct Plan {
    enum Kind kind;
    float absolute, relative; /* an element may differ by absolute + relative * |expected| */
    uint32_t count;
    struct Request *requests;
};

struct Verdict {
    bool right;
    bool inexact; /* right, yet not bit for bit */
};

struct Plan *plan_load(const char *path);

/* Whether `body`, a whole framed answer, is the right one to a request that carried `id`. Puts what is wrong into
 * `problem`. */
struct Verdict plan_check(const struct Plan *plan, const struct Request *request, const char *id, const uint8_t *body,
                          size_t length, char *problem, size_t room);

/* -- headers.c ----------------------------------------------------------------------------------------------------- */

enum Style { GRPCIO, INDEXED };

struct Metadata {
    enum Style style;
    bool timeout, traceparent, tls;
    const char *authority, *user_agent;
};

struct Headers; /* what one connection's encoder remembers */

struct Headers *headers_new(const struct Metadata *metadata);

/* Write the block of the next call to `out`; returns its length, at most `room`. */
size_t headers_write(struct Headers *headers, uint8_t *out, size_t room);

uint64_t random_bits(void);

/* -- connection.c -------------------------------------------------------------------------------------------------- */

struct Call {
    const struct Request *request;
    uint32_t stream; /* 0: nothing in flight */
    uint64_t began;  /* microseconds */
    char id[ID_LENGTH + 1];
    uint8_t *body;
    size_t length, room;
    int status;           /* grpc-status; -1: none has come */
    char message[128];    /* grpc-message */
};

struct Totals {
    uint64_t sent, right, inexact, wrong, failed;
    char first[256]; /* what the first answer that was not right looked like */
};

/* What all connections share. */
struct Load {
    const struct Plan *plan;
    struct Metadata metadata;
    uint32_t streams; /* in flight on one connection */
    uint64_t next;    /* counts the requests: the plan's turn, and the id */
    bool stopping;    /* no further request is begun */
    uint64_t flying;
    struct Totals totals;
    FILE *log;
};

struct Connection {
    struct Load *load;
    int fd;
    SSL *ssl; /* NULL: plaintext */
    bool blocked; /* what is in `out` waits for the socket */
    struct Headers *headers;
    nghttp2_hd_inflater *inflater;
    struct Call *calls;
    uint32_t *idle, idle_count;
    uint16_t *by_stream; /* the call of each stream in flight, plus 1 */
    uint32_t next_stream;
    int64_t window; /* bytes that the server takes at present on this connection */
    int64_t stream_window;
    uint32_t received; /* bytes of DATA that the server has not been granted anew */
    uint8_t *in, *out;
    size_t in_length, out_length, out_begin, out_room;
};

/* Over a connected socket in blocking mode; it becomes non-blocking. `tls`: NULL for plaintext. */
void connection_open(struct Connection *connection, struct Load *load, int fd, SSL_CTX *tls);

/* Read what there is, settle the calls that were answered, begin others in their place and write. */
void connection_read(struct Connection *connection);

/* Begin as many calls as streams and windows allow and write them. */
void connection_write(struct Connection *connection);

/* -- traffic.c ----------------------------------------------------------------------------------------------------- */

uint64_t now_us(void); /* since the epoch, and never backwards */

/* A message to stderr, and exit with 1. */
__attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...);

void *allocate(size_t count, size_t size);

#endif
